"""Keep compiled graphs in a folder of the user's choice, so that a second start compiles in a fraction of the first.

torch keeps its cache under the temporary directory by default, which a reboot empties; rented machines and containers
start with it empty every time.
"""

import os
from dataclasses import dataclass

from nanochat.cli.flags import flag
from nanochat.cli.paths import folder_problem
from nanochat.common import resolve
from nanochat.features.base import Feature


class CompileCache(Feature):
    name = "compile_cache"

    @dataclass
    class Config:
        """Compile cache"""
        compile_cache_dir: str | None = flag(None, "keep compiled graphs in this folder across runs", metavar="DIR", free=True)

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].compile_cache_dir is not None

    @classmethod
    def validate(cls, config) -> list[str]:
        if not cls.enabled(config):
            return []
        if not config.run.compile:
            return ["--compile-cache-dir has nothing to keep under --no-compile: leave one of them out"]
        trouble = folder_problem(config.features[cls.name].compile_cache_dir)
        return [f"--compile-cache-dir: {trouble}"] if trouble else []

    def on_model(self, model, horizon) -> None:
        folder = resolve(self.config.compile_cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
