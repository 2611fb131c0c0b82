"""
Writes the project's addresses into what is about to be built, before a release.

They are those of the repository that releases it, whose name only its workflow knows.
On a package index the links of README.md would lead nowhere: they get the address of
the same file in the repository, as of the tag.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


def main() -> None:
    """
    Changes pyproject.toml and README.md in the working directory.
    """
    home = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
    tag = os.environ["GITHUB_REF_NAME"]
    urls = {
        "Homepage": home,
        "Documentation": f"{home}/blob/{tag}/README.md#documentation",
        "Source": f"{home}/tree/{tag}",
        "Issues": f"{home}/issues",
        "Changelog": f"{home}/blob/{tag}/CHANGELOG.md",
    }
    with Path("pyproject.toml").open("a", encoding="utf-8") as project:
        project.write("\n[project.urls]\n")
        project.writelines(f'{name} = "{url}"\n' for name, url in urls.items())

    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    text = re.sub(r"\]\((?!https?:|#)", f"]({home}/blob/{tag}/", text)
    text = re.sub(r'(src|srcset)="(?!https?:)', rf'\1="{home}/raw/{tag}/', text)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
