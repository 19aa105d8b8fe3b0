"""A stand-in for a host of nnsight's remote execution: a process with a model, and without this library.

Run as a script with the model's folder; each line on standard input names the file of a packed request and the file
for its result. What it does with a request is what nnsight documents for a server: resolve the model's parts by their
persistent ids, compile the block's source, run it, send back what was saved.
"""

import sys
import traceback
from pathlib import Path
from typing import Any


def serve(folder: str) -> None:
    """Answer requests until standard input ends."""
    import torch
    from nnsight import TransformersModel
    from nnsight.schema.request import RequestModel
    from nnsight.tracing import tracer as tracing
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    assert "vlmneurons" not in sys.modules
    hf = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    model = TransformersModel(hf, processor=processor, task="image-text-to-text")
    parts = model._remoteable_persistent_objects()
    print("ready", flush=True)
    for line in sys.stdin:
        request, result = map(Path, line.split())
        try:
            tracer = RequestModel.deserialize(request.read_bytes(), parts, compress=True)
            before = set(tracer.info.frame.f_locals)
            tracing.inc()
            try:
                tracer.execute(tracer.info.code)
                frame = tracer.info.frame.f_locals
                saved = {name: frame[name] for name in frame if name not in before}
            finally:
                tracing.dec()
            torch.save(saved, result)
            print("done", flush=True)
        except BaseException:
            print("failed " + repr(traceback.format_exc()), flush=True)


class Host:
    """The process, seen from here: a backend of nnsight that sends its requests to it."""

    def __init__(self, folder: Any, scratch: Path) -> None:
        import os
        import subprocess

        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # An installed copy of this library must not be found there either.
        code = (
            "import sys, runpy; sys.modules['vlmneurons'] = None; "
            f"server = runpy.run_path({str(Path(__file__))!r}); del sys.modules['vlmneurons']; "
            "sys.meta_path.insert(0, type('No', (), {'find_spec': staticmethod(lambda name, *_: "
            "(_ for _ in ()).throw(ModuleNotFoundError(name)) if name.split('.')[0] == 'vlmneurons' else None)})); "
            f"server['serve']({str(folder)!r})"
        )
        self.scratch, self.jobs = scratch, 0
        self.received = 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=scratch,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready"

    def __call__(self, tracer: Any) -> None:
        import torch
        from nnsight.ndif import pull_env
        from nnsight.schema.request import RequestModel
        from nnsight.tracing.tracer import save
        from nnsight.tracing.util import push

        pull_env()
        self.jobs += 1
        request, result = self.scratch / f"{self.jobs}.request", self.scratch / f"{self.jobs}.result"
        request.write_bytes(RequestModel.serialize(tracer, compress=True))
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{request} {result}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if answer != "done":
            raise RuntimeError(answer)
        self.received += result.stat().st_size
        saved = torch.load(result, map_location="cpu", weights_only=False)
        for value in saved.values():
            save(value)
        push(tracer.info.frame, saved)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()
