"""OpenVINO GenAI: continuous batching with paged attention, everything float32 unless told otherwise."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from benchmarks.engines.protocol import serve


class OpenVino:
    def prepare(self, model: str, threads: int, **options: Any) -> dict[str, str]:
        import openvino as ov
        import openvino_genai as genai

        self.ov, self.genai = ov, genai
        scheduler = genai.SchedulerConfig()
        tokens = scheduler.max_num_batched_tokens = int(options.get("tokens", 2048))
        if "blocks" in options:
            scheduler.num_kv_blocks = int(options["blocks"])
        else:
            scheduler.cache_size = 2
        scheduler.enable_prefix_caching = False
        precision, kv = options.get("precision", "f32"), options.get("kv", "f32")
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": kv,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": threads,
        }
        self.pipe = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self.ids = itertools.count()
        self.handles: list[Any] = []
        return {
            "version": genai.__version__,
            "configuration": f"continuous batching, paged attention, {tokens} tokens a call; "
            f"arithmetic {precision}, KV {kv}",
        }

    def reset(self, batch: int, length: int) -> None:
        for handle in self.handles:
            handle.cancel()
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
        self.handles = []

    def _start(self, prompts: list[list[int]], new: int) -> None:
        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos = True
        config.apply_chat_template = False
        self.handles = [
            self.pipe.add_request(next(self.ids), self.ov.Tensor(np.array([p], np.int64)), config)
            for p in prompts
        ]

    def fill(self, prompts: list[list[int]], room: int) -> None:
        self._start(prompts, room + 64)
        waiting = list(self.handles)
        while waiting:
            self.pipe.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        self._read()

    def _read(self) -> int:
        return sum(1 for handle in self.handles if handle.can_read() and handle.read())

    def step(self) -> None:
        self.pipe.step()
        if self._read() != len(self.handles):
            raise RuntimeError("a step did not decode every sequence")

    def prefill(self, prompt: list[int]) -> int:
        self._start([prompt], 1)
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
        (answer,) = self.handles[0].read_all()
        return int(answer.generated_ids[0])

    def generate(self, prompts: list[list[int]], new: int) -> None:
        self._start(prompts, new)
        self.taken = 0
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
            self.taken = max(self.taken, self.pipe.get_metrics().cache_size_in_bytes)
        if any(len(handle.read_all()[0].generated_ids) != new for handle in self.handles):
            raise RuntimeError("a request was cut short")

    def kv_bytes(self) -> int:
        return int(self.taken)


if __name__ == "__main__":
    serve(OpenVino())
