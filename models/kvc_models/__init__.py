"""Models to compile and to test with: exported to ONNX from PyTorch, with weights that need no model hub.

    export_named("smollm2-135m", Path("build/smollm2-135m.onnx"))   a real trained model
    export_tiny("qwen2", Path("qwen2.onnx"), with_past=True)         random weights, for tests
    transformers_greedy("smollm2-135m", [[1, 2, 3]], 16)             what transformers generates

The same from a shell: `python -m kvc_models list` and `python -m kvc_models export NAME OUT.onnx`.
"""

from kvc_models.export import ModelError, assets_folder, export_decoder
from kvc_models.others import export_cnn, export_encoder
from kvc_models.reference import transformers_greedy
from kvc_models.registry import ENTRIES, export_named
from kvc_models.tiny import FAMILIES, export_tiny, make_tiny

__all__ = [
    "ENTRIES",
    "FAMILIES",
    "ModelError",
    "assets_folder",
    "export_cnn",
    "export_decoder",
    "export_encoder",
    "export_named",
    "export_tiny",
    "make_tiny",
    "transformers_greedy",
]
