"""kvc: its Session, as a program uses it (scheduler, pages and sampling included)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.engines.protocol import serve


class Kvc:
    def prepare(self, model: str, threads: int, **options: Any) -> dict[str, str]:
        import kvc

        self.session = kvc.load(Path(model), verify=False, threads=threads)
        self.params = kvc.SamplingParams
        self.live: list[int] = []
        artifact = kvc.Artifact.open(model, verify=False)
        plan, types = artifact.plan, {site.kv_dtype for site in artifact.facts.sites}
        self.pools = plan.bytes.pools
        return {
            "version": kvc.__version__,
            "configuration": f"Session, promised {plan.bytes.total / 1e6:.0f} MB, chunks of {plan.chunk}, "
            f"pages of {plan.page_size} tokens; arithmetic float32, KV {', '.join(sorted(types))}",
        }

    def reset(self, batch: int, length: int) -> None:
        for id in self.live:
            self.session.cancel(id)
        self.session.step()
        self.live = []

    def _start(self, prompts: list[list[int]], room: int) -> None:
        params = self.params(max_new_tokens=room + 1, ignore_eos=True)
        self.live = [self.session.add_request(prompt, params) for prompt in prompts]

    def fill(self, prompts: list[list[int]], room: int) -> None:
        # Requests that are done first go on while the others are computed.
        self._start(prompts, room + len(prompts) * len(prompts[0]))
        waiting = set(self.live)
        while waiting:
            waiting -= {event.id for event in self.session.step()}

    def step(self) -> None:
        if len(self.session.step()) != len(self.live):
            raise RuntimeError("a step did not decode every sequence")

    def prefill(self, prompt: list[int]) -> int:
        self._start([prompt], 0)
        while not (events := self.session.step()):
            pass
        token = events[0].token
        assert token is not None
        return token

    def generate(self, prompts: list[list[int]], new: int) -> None:
        self.session.generate(prompts, max_new_tokens=new, ignore_eos=True)

    def kv_bytes(self) -> int:
        return int(self.pools)


if __name__ == "__main__":
    serve(Kvc())
