from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from onnx_decompose.errors import DataError, ModelError, OptionError, ProviderError
from onnx_decompose.model.tensors import BFLOAT16, TensorSpec
from onnx_decompose.runtime import sessions
from onnx_decompose.runtime.sessions import (
    Provider,
    SessionSettings,
    open_session,
    resolve_provider,
)

if TYPE_CHECKING:
    from pathlib import Path

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> {text}')


def product_model(dtype: str = "float") -> bytes:
    text = f"g ({dtype}[N, 2] x, {dtype}[2, K] w) => ({dtype}[N, K] y) {{ y = MatMul(x, w) }}"
    return bytes(parse(text).SerializeToString())


def identity_model(dtype: str) -> bytes:
    text = f"g ({dtype}[N] x) => ({dtype}[N] y) {{ y = Identity(x) }}"
    return bytes(parse(text).SerializeToString())


class FakeRuntime(types.ModuleType):
    """An onnxruntime with the CUDA provider, without the GPU."""

    def __init__(
        self,
        available: tuple[str, ...] = (CUDA, CPU),
        *,
        got: tuple[str, ...] = (CUDA,),
        failure: str = "",
        fails_from: int = 0,
    ) -> None:
        super().__init__("onnxruntime")
        self.__version__ = "1.0"
        self.available = available
        self.got = got
        self.failure = failure
        self.fails_from = fails_from
        self.preloaded = 0
        self.opened: list[dict[str, Any]] = []
        self.GraphOptimizationLevel = types.SimpleNamespace(
            ORT_ENABLE_ALL="all", ORT_DISABLE_ALL="none"
        )

    def get_available_providers(self) -> list[str]:
        return list(self.available)

    def preload_dlls(self) -> None:
        self.preloaded += 1

    def SessionOptions(self) -> object:  # noqa: N802
        entries: dict[str, str] = {}
        return types.SimpleNamespace(
            entries=entries, add_session_config_entry=entries.__setitem__
        )

    def InferenceSession(  # noqa: N802
        self,
        source: object,
        options: object,
        *,
        providers: list[tuple[str, dict[str, str]]],
        enable_fallback: bool,
    ) -> object:
        assert self.preloaded or providers[0][0] == CPU
        self.opened.append(
            {
                "source": source,
                "options": options,
                "providers": providers,
                "enable_fallback": enable_fallback,
            }
        )
        if self.failure and len(self.opened) > self.fails_from:
            raise RuntimeError(self.failure)
        return types.SimpleNamespace(
            get_providers=lambda: list(self.got), get_inputs=list, get_outputs=list
        )


def use(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> FakeRuntime:
    monkeypatch.setattr(sessions, "_onnxruntime", lambda: runtime)
    return runtime


CPU_NODES = (
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to "
    "the default CPU EP, but fallback to CPU EP has been explicitly disabled by the user."
)


class TestResolveProvider:
    def test_cpu_is_the_cpu(self) -> None:
        assert resolve_provider("cpu") is Provider.CPU

    def test_unknown_name(self) -> None:
        name: Any = "tpu"
        with pytest.raises(OptionError, match="'tpu' is unknown; choose auto, cpu or cuda"):
            resolve_provider(name)

    def test_auto_without_cuda_build(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtime = use(monkeypatch, FakeRuntime((CPU,)))
        assert resolve_provider("auto") is Provider.CPU
        assert runtime.opened == []

    def test_auto_takes_cuda_where_a_session_really_opens(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime = use(monkeypatch, FakeRuntime())
        assert resolve_provider("auto") is Provider.CUDA
        assert runtime.preloaded == 1
        assert len(runtime.opened) == 1

    def test_auto_without_a_working_gpu_is_the_cpu(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeRuntime(failure="CUDA failure 100: no device"))
        assert resolve_provider("auto") is Provider.CPU

    def test_auto_with_a_model_that_needs_cpu_nodes_is_the_cpu(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime = use(monkeypatch, FakeRuntime(failure=CPU_NODES, fails_from=1))
        assert resolve_provider("auto", model=b"model") is Provider.CPU
        assert [opened["source"] == b"model" for opened in runtime.opened] == [False, True]

    def test_cuda_without_cuda_build(self, monkeypatch: pytest.MonkeyPatch) -> None:
        use(monkeypatch, FakeRuntime((CPU,)))
        with pytest.raises(ProviderError, match=r"install onnx-decompose\[cuda\]") as caught:
            resolve_provider("cuda")
        assert caught.value.exit_code == 3

    def test_cuda_without_a_working_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        use(monkeypatch, FakeRuntime(failure="CUDA failure 100: no device\nat foo.cc:3"))
        with pytest.raises(ProviderError, match=r"nvidia-smi.*no device") as caught:
            resolve_provider("cuda")
        assert "\n" not in str(caught.value)

    def test_cuda_that_comes_out_as_cpu_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeRuntime(got=(CPU,)))
        with pytest.raises(ProviderError, match=f"runs on {CPU}"):
            resolve_provider("cuda")

    def test_no_onnxruntime_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.setattr(sessions, "_onnxruntime", sessions._onnxruntime.__wrapped__)
        with pytest.raises(ProviderError, match=r"install onnx-decompose\[cpu\]"):
            resolve_provider("cpu")

    def test_onnxruntime_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(name: str) -> None:
            raise ImportError(f"lib{name}.so: no such file")

        monkeypatch.setattr(importlib, "import_module", broken)
        monkeypatch.setattr(sessions, "_onnxruntime", sessions._onnxruntime.__wrapped__)
        with pytest.raises(
            ProviderError, match=r"cannot be loaded \(libonnxruntime.so: no such"
        ):
            resolve_provider("cpu")

    def test_an_interruption_while_it_loads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An extension module of pybind11 makes an ImportError of whatever is raised meanwhile."""

        def interrupted(_: str) -> None:
            raise ImportError("initialization failed") from KeyboardInterrupt()

        monkeypatch.setattr(importlib, "import_module", interrupted)
        monkeypatch.setattr(sessions, "_onnxruntime", sessions._onnxruntime.__wrapped__)
        with pytest.raises(KeyboardInterrupt):
            resolve_provider("cpu")


class TestCudaSession:
    def test_no_fallback_and_no_tf32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtime = use(monkeypatch, FakeRuntime())
        runtime.preload_dlls()
        open_session(b"model", Provider.CUDA)
        (opened,) = runtime.opened
        assert opened["providers"] == [(CUDA, {"use_tf32": "0"})]
        assert opened["enable_fallback"] is False
        assert opened["options"].entries["session.disable_cpu_ep_fallback"] == "1"
        assert opened["options"].entries["session.intra_op.allow_spinning"] == "0"

    def test_deterministic_kernels_on_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtime = use(monkeypatch, FakeRuntime())
        runtime.preload_dlls()
        for wanted in (False, True):
            open_session(b"model", Provider.CUDA, SessionSettings(deterministic=wanted))
            assert runtime.opened[-1]["options"].use_deterministic_compute is wanted

    def test_tf32_on_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtime = use(monkeypatch, FakeRuntime())
        runtime.preload_dlls()
        open_session(b"model", Provider.CUDA, SessionSettings(tf32=True))
        assert runtime.opened[0]["providers"] == [(CUDA, {"use_tf32": "1"})]

    def test_nodes_without_kernel_name_the_model_and_the_way_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime = use(monkeypatch, FakeRuntime(failure=CPU_NODES))
        runtime.preload_dlls()
        with pytest.raises(ProviderError, match=r"^m\.onnx: some nodes have no CUDA.*cpu"):
            open_session(b"model", Provider.CUDA, label="m.onnx")

    def test_cpu_sessions_get_neither(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtime = use(monkeypatch, FakeRuntime(got=(CPU,)))
        open_session(b"model", Provider.CPU, SessionSettings(optimize=False, threads=3))
        (opened,) = runtime.opened
        assert opened["providers"] == [(CPU, {})]
        assert "session.disable_cpu_ep_fallback" not in opened["options"].entries
        assert opened["options"].graph_optimization_level == "none"
        assert opened["options"].intra_op_num_threads == 3


class FakeBinding:
    """Remembers what is bound, and gives each output that is left to the device an address."""

    def __init__(self) -> None:
        self.outputs: dict[str, str] = {}
        self.runs: list[str | None] = []

    def bind_output(self, name: str, device: str) -> None:
        self.outputs[name] = f"any address on {device}"

    def bind_ortvalue_output(self, name: str, value: str) -> None:
        self.outputs[name] = value

    def get_outputs(self) -> list[str]:
        return [f"value {len(self.runs)} of {name}" for name in self.outputs]

    def synchronize_outputs(self) -> None:
        pass


class TestCudaGraph:
    """A captured graph is replayed at its first run's shapes and addresses."""

    @pytest.fixture
    def bindings(self, monkeypatch: pytest.MonkeyPatch) -> list[FakeBinding]:
        runtime = use(monkeypatch, FakeRuntime())
        runtime.preload_dlls()
        made: list[FakeBinding] = []

        def io_binding() -> FakeBinding:
            made.append(FakeBinding())
            return made[-1]

        def run(binding: FakeBinding, options: Any) -> None:
            binding.runs.append(None if options is None else options.entries["gpu_graph_id"])

        def run_options() -> object:
            entries: dict[str, str] = {}
            return types.SimpleNamespace(
                entries=entries, add_run_config_entry=entries.__setitem__
            )

        output = types.SimpleNamespace(name="y", type="tensor(float)", shape=["N"])
        session = types.SimpleNamespace(
            get_providers=lambda: [CUDA],
            get_inputs=list,
            get_outputs=lambda: [output],
            io_binding=io_binding,
            run_with_iobinding=run,
        )
        opened = runtime.InferenceSession

        def inference_session(*args: Any, **kwargs: Any) -> object:
            opened(*args, **kwargs)
            return session

        monkeypatch.setattr(runtime, "InferenceSession", inference_session)
        monkeypatch.setattr(runtime, "RunOptions", run_options, raising=False)
        self.runtime = runtime
        return made

    def test_each_binding_is_a_graph_of_its_own_with_fixed_outputs(
        self, bindings: list[FakeBinding]
    ) -> None:
        session = open_session(b"model", Provider.CUDA, SessionSettings(cuda_graph=True))
        assert self.runtime.opened[0]["providers"] == [
            (CUDA, {"use_tf32": "0", "enable_cuda_graph": "1"})
        ]
        for run in [session.bind({}), session.bind({})]:
            run()
            run()
        # The first run captures nothing: it only tells the outputs' shapes.
        assert [binding.runs for binding in bindings] == [["-1", "1", "1"], ["-1", "2", "2"]]
        assert bindings[0].outputs == {"y": "value 1 of y"}
        session.reopen().bind({})()
        assert bindings[2].runs == ["-1", "1"]

    def test_without_it_nothing_is_captured(self, bindings: list[FakeBinding]) -> None:
        open_session(b"model", Provider.CUDA).bind({})()
        assert bindings[0].runs == [None]
        assert bindings[0].outputs == {"y": "any address on cuda"}


@pytest.mark.gpu
def test_cuda_runs_on_cuda() -> None:
    try:
        provider = resolve_provider("cuda")
    except ProviderError as error:
        pytest.skip(str(error))
    session = open_session(product_model(), provider)
    x, w = np.eye(2, dtype=np.float32), np.full((2, 3), 1 + 2**-20, np.float32)
    # TF32 would round 1 + 2^-20 to 1.
    np.testing.assert_array_equal(session.run({"x": x, "w": w})["y"], w)
    session.bind({"x": x, "w": w})()


class TestRun:
    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("float", np.dtype(np.float32)),
            ("double", np.dtype(np.float64)),
            ("float16", np.dtype(np.float16)),
            ("bfloat16", BFLOAT16),
            ("int64", np.dtype(np.int64)),
            ("bool", np.dtype(np.bool_)),
        ],
    )
    @pytest.mark.parametrize("count", [3, 0])
    def test_every_dtype_comes_back_as_it_went_in(
        self, name: str, dtype: np.dtype[Any], count: int
    ) -> None:
        session = open_session(identity_model(name), Provider.CPU)
        x = np.array([0, 1, 3][:count]).astype(dtype)
        y = session.run({"x": x})["y"]
        assert y.dtype == dtype
        assert y.shape == (count,)
        assert (y == x).all()
        assert session.inputs == (TensorSpec("x", dtype, ("N",)),)

    def test_strings(self) -> None:
        session = open_session(identity_model("string"), Provider.CPU)
        y = session.run({"x": np.array(["a", "b"], object)})["y"]
        assert y.tolist() == ["a", "b"]

    def test_bfloat16_scalars_and_strided_arrays(self) -> None:
        text = "g (bfloat16[N, M] x, bfloat16[] s) => (bfloat16[M, N] y, bfloat16[] t) "
        body = "{ y = Transpose(x) t = Identity(s) }"
        session = open_session(bytes(parse(text + body).SerializeToString()), Provider.CPU)
        x = np.arange(6).reshape(2, 3).astype(BFLOAT16).T
        s = np.array(2.5, BFLOAT16)
        outputs = session.run({"x": x, "s": s})
        assert (outputs["y"] == x.T).all()
        assert outputs["t"].shape == ()
        assert outputs["t"] == s

    def test_missing_input_is_named(self) -> None:
        session = open_session(product_model(), Provider.CPU, label="m.onnx")
        with pytest.raises(DataError, match=r"^m\.onnx: input 'w' has no data"):
            session.run({"x": np.ones((1, 2), np.float32)})

    def test_a_failing_node_is_one_line_without_source_positions(self) -> None:
        text = "g (float[N, K] x, float[M, L] w) => (float[N, L] y) { y = MatMul(x, w) }"
        session = open_session(
            bytes(parse(text).SerializeToString()), Provider.CPU, label="m.onnx"
        )
        feeds = {"x": np.ones((1, 2), np.float32), "w": np.ones((3, 3), np.float32)}
        with pytest.raises(ModelError, match=r"^m\.onnx: .*MatMul") as caught:
            session.run(feeds)
        assert "\n" not in str(caught.value)
        assert ".h:" not in str(caught.value)
        assert "ONNXRuntimeError" not in str(caught.value)

    def test_bound_runs_work_and_fail_alike(self) -> None:
        session = open_session(product_model(), Provider.CPU)
        run = session.bind({"x": np.ones((1, 2), np.float32), "w": np.ones((2, 3), np.float32)})
        run()
        run()
        with pytest.raises(DataError, match="'w' has no data"):
            session.bind({"x": np.ones((1, 2), np.float32)})


class TestOpen:
    @pytest.mark.parametrize("content", [b"", b"garbage"])
    def test_unreadable_bytes(self, content: bytes) -> None:
        with pytest.raises(ModelError, match=r"^m\.onnx: .*proto") as caught:
            open_session(content, Provider.CPU, label="m.onnx")
        assert "\n" not in str(caught.value)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"none\.onnx: no such file; give"):
            open_session(tmp_path / "none.onnx", Provider.CPU)

    def test_unknown_operator_is_named(self) -> None:
        model = parse("g (float[N] x) => (float[N] y) { y = Mystery(x) }").SerializeToString()
        with pytest.raises(ModelError, match=r"^model: .*Mystery"):
            open_session(bytes(model), Provider.CPU)

    def test_a_sequence_output_is_refused(self) -> None:
        model = parse("g (float[N] x) => (seq(float[N]) y) { y = SequenceConstruct(x) }")
        with pytest.raises(ModelError, match=r"'y' is a seq\(tensor\(float\)\)"):
            open_session(bytes(model.SerializeToString()), Provider.CPU)

    def test_external_data_by_path_and_by_bytes(self, tmp_path: Path) -> None:
        model = parse("g (float[N, 2] x) => (float[N, 2] y) { y = Mul(x, w) }")
        weight = onnx.numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "w")
        model.graph.initializer.append(weight)
        path = tmp_path / "m.onnx"
        onnx.save_model(
            model, path, save_as_external_data=True, location="w.bin", size_threshold=0
        )
        content = path.read_bytes()
        x = np.ones((1, 2), np.float32)
        by_path = open_session(path, Provider.CPU)
        by_bytes = open_session(content, Provider.CPU, data_folder=tmp_path)
        for session in (by_path, by_bytes):
            assert session.run({"x": x})["y"].tolist() == [[1.0, 2.0]]
        assert by_path.label == str(path)
        assert by_bytes.reopen().run({"x": x})["y"].tolist() == [[1.0, 2.0]]
        with pytest.raises(ModelError, match=r"^model: .*xternal data"):
            open_session(content, Provider.CPU)

    def test_a_closed_session_can_be_opened_again(self) -> None:
        session = open_session(product_model(), Provider.CPU)
        feeds = {"x": np.ones((1, 2), np.float32), "w": np.ones((2, 3), np.float32)}
        session.close()
        with pytest.raises(AttributeError):
            session.run(feeds)
        assert session.reopen().run(feeds)["y"].tolist() == [[2.0, 2.0, 2.0]]

    def test_unoptimized_sessions_give_the_same(self) -> None:
        settings = SessionSettings(optimize=False, threads=1)
        session = open_session(product_model(), Provider.CPU, settings)
        x, w = np.ones((1, 2), np.float32), np.ones((2, 3), np.float32)
        assert session.run({"x": x, "w": w})["y"].tolist() == [[2.0, 2.0, 2.0]]


def test_messages_lose_codes_signatures_and_later_lines() -> None:
    error = RuntimeError(
        "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: "
        "/src/onnxruntime/core/optimizer/initializer.cc:43 "
        "onnxruntime::Initializer::Initializer(const onnx::TensorProto&, const Path&) "
        "[ONNXRuntimeError] : 1 : FAIL : GetFileLength for w.bin failed\nStacktrace:"
    )
    expected = "Exception during initialization: GetFileLength for w.bin failed"
    assert sessions._reason(error) == expected
    assert len(sessions._reason(RuntimeError("word " * 200))) <= 240
    assert sessions._reason(RuntimeError()) == "RuntimeError"
