"""Graph passes on onnx-graphsurgeon: what changes a model; everything else only reads it.

The source folder ``passes/`` is installed as ``onnx_decompose.passes`` and has that name only.
Under a second name its classes would exist twice and ``isinstance`` would fail without a word.
"""

if __name__ != "onnx_decompose.passes":
    raise ImportError(
        f"import onnx_decompose.passes instead of {__name__!r}: "
        "the folder passes/ is not an import name of its own",
        name=__name__,
    )
