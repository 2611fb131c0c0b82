#!/bin/sh
# Ray Serve 2.60: `@serve.multiplexed` tears down a model in the middle of a request. When a
# replica has as many models as it may, the one that was asked for longest ago goes, whether
# or not a request is working with it: Serve calls the model's `__del__` though the request
# still holds it. Python calls it once more in the end, so that it runs twice.
#
# Seen with one model per replica: "a" is torn down during its request as soon as "b" is asked
# for; `__del__` of "a" has run twice in the end.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "ray[serve]==2.60.0"
export HOME="$work" TMPDIR="$work" RAY_USAGE_STATS_ENABLED=0
timeout 300 "$work/venv/bin/python" - <<'PYTHON'
import asyncio

import ray
from ray import serve


@serve.deployment(num_replicas=1, max_ongoing_requests=5, ray_actor_options={"num_cpus": 0})
class Models:
    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.torn_down: list[str] = []

    @serve.multiplexed(max_num_models_per_replica=1)
    async def get(self, name: str):
        torn_down = self.torn_down

        class Model:
            def __del__(self) -> None:
                torn_down.append(name)

        self.loaded.append(name)
        return Model()

    async def work(self, seconds: float) -> bool:
        """Uses the model until it is torn down: True, or for that long: False."""
        model = await self.get(serve.get_multiplexed_model_id())
        name = self.loaded[-1]
        for _ in range(int(seconds * 20)):
            if name in self.torn_down:
                return bool(model)
            await asyncio.sleep(0.05)
        return False

    def state(self) -> tuple[list[str], list[str]]:
        return self.loaded, self.torn_down


async def main(handle) -> None:
    first = handle.options(multiplexed_model_id="a").work.remote(60)
    while (await handle.state.remote())[0] != ["a"]:
        await asyncio.sleep(0.05)
    await handle.options(multiplexed_model_id="b").work.remote(0)
    in_use = await first
    for _ in range(100):
        torn_down = (await handle.state.remote())[1]
        if torn_down.count("a") > 1:
            break
        await asyncio.sleep(0.05)
    print("ray", ray.__version__, "torn down in use:", in_use, "runs of __del__:", torn_down)
    assert in_use, "a model in use is spared now"
    assert torn_down.count("a") == 2, "__del__ runs once now"


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
asyncio.run(main(serve.run(Models.bind(), route_prefix=None)))
serve.shutdown()
PYTHON
