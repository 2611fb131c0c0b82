"""
What ``whispercache run`` puts into the PYTHONPATH of programs: this folder, whose
``sitecustomize`` each Python imports when it starts.
"""
