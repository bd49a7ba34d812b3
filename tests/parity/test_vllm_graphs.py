"""The twin CUDA graphs, as far as a machine without a GPU can show: vLLM's own graph manager
chooses between them, and the seams of its V2 runner are as the plugin expects."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spo.engines.vllm.launch import VllmSettings, start_llm
from spo.engines.vllm.plugin import graphs, install, worker
from spo.engines.vllm.plugin.op import Switch
from spo.engines.vllm.plugin.wire import CONFIG_KEY, PluginConfig
from spo.errors import EngineError, SteeringError

pytestmark = pytest.mark.vllm
LAYERS = 4


@pytest.fixture
def manager(monkeypatch):
    """vLLM's `ModelCudaGraphManager` with both kinds of graphs; only the GPU's part is left out."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu import cudagraph_utils

    first = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: first)
    monkeypatch.setattr(
        cudagraph_utils, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: None)
    )
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=[1, 2, 4, 8], max_cudagraph_capture_size=8
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        speculative_config=None,
    )
    made = cudagraph_utils.ModelCudaGraphManager(
        config,
        torch.device("cpu"),
        CUDAGraphMode.FULL_AND_PIECEWISE,
        decode_query_len=1,
        lora_capture_cases=[0, 1],
    )
    made._graphs_captured = True
    return made


def test_vllm_chooses_the_graph_of_the_switch_for_decoding_and_for_prefill(manager):
    switch = Switch()
    graphs.twin_manager(manager, switch, LAYERS)
    for on in (False, True, False):
        switch.on = on
        decode = manager.dispatch(3, 3, 1, num_active_loras=0, max_query_len=1)
        prefill = manager.dispatch(2, 7, None, num_active_loras=0, max_query_len=None)
        assert (decode.cg_mode.name, decode.num_tokens) == ("FULL", 4)
        assert (prefill.cg_mode.name, prefill.num_tokens) == ("PIECEWISE", 8)
        assert decode.num_active_loras == prefill.num_active_loras == int(on)


def test_every_size_is_captured_twice_and_counted(manager):
    descriptors = [d for listed in manager._capture_descs.values() for d in listed]
    manager.graphs = {d: object() for d in descriptors if d.cg_mode.name == "FULL"}
    assert graphs.count_graphs(SimpleNamespace(cudagraph_manager=manager)) == dict.fromkeys(
        ("FULL", "FULL steered", "PIECEWISE", "PIECEWISE steered"), 4
    )
    assert graphs.count_graphs(SimpleNamespace()) == {}


class Capture:
    """A capture as `CudaGraphManager.capture` makes it: the hook, then a forward pass."""

    def __init__(self, switch, launches):
        self.switch, self.launches = switch, launches

    def dispatch(self):
        raise AssertionError

    def capture(self, model, *, lora_capture_hook=None):
        for number_of_adapters in (0, 1, 0):
            lora_capture_hook(number_of_adapters, 1, 1)
            self.switch.launches += self.launches[self.switch.on]


@pytest.mark.parametrize(
    ("launches", "good"),
    [((0, LAYERS), True), ((0, 2 * LAYERS), True), ((0, LAYERS - 1), False), ((1, LAYERS), False)],
)
def test_a_graph_without_its_kernels_is_refused_at_capture(launches, good):
    switch = Switch()
    manager = Capture(switch, launches)
    graphs.twin_manager(manager, switch, LAYERS)
    if good:
        manager.capture("model", lora_capture_hook=None)
    else:
        with pytest.raises(SteeringError, match=r"captured with \d+ steering kernels"):
            manager.capture("model", lora_capture_hook=None)
    assert not switch.on


def test_lora_s_own_capture_is_not_taken_over():
    switch = Switch()
    manager = Capture(switch, (0, LAYERS))
    graphs.twin_manager(manager, switch, LAYERS)
    with pytest.raises(SteeringError, match="LoRA"):
        manager.capture("model", lora_capture_hook=lambda *_: None)
    for lora, data_parallel, free in ((None, 1, True), (object(), 1, False), (None, 2, False)):
        runner = SimpleNamespace(lora_config=lora, lora_capture_cases=[0])
        config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=data_parallel))
        assert graphs.can_twin(runner, config) is free


def test_the_seams_of_the_v2_runner_are_as_expected():
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def names(method):
        return list(inspect.signature(method).parameters)

    for seam in ("add_requests", "finish_requests", "prepare_inputs", "gather_batch_req_state"):
        assert names(getattr(GPUModelRunner, seam))[1] == "scheduler_output"
    assert names(GPUModelRunner.prepare_inputs)[2:] == [
        "batch_req_state",
        "batch_desc",
        "num_active_loras",
    ]
    assert "lora_capture_hook" in names(ModelCudaGraphManager.capture)
    assert "num_active_loras" in names(ModelCudaGraphManager.dispatch)
    source = inspect.getsource(GPUModelRunner.execute_model)
    order = [
        source.index(text)
        for text in ("gather_batch_req_state(", "dispatch_cg_and_sync_dp(", "self.prepare_inputs(")
    ]
    assert order == sorted(order)


class V2Runner:
    """The V2 runner's methods that the plugin wraps, and what a step calls."""

    def __init__(self):
        self.lora_config, self.lora_capture_cases = None, [0]

    def add_requests(self, scheduler_output): ...
    def finish_requests(self, scheduler_output): ...
    def initialize_kv_cache(self, config): ...
    def gather_batch_req_state(self, scheduler_output, dummy_run): ...

    def prepare_inputs(self, scheduler_output, batch_req_state, batch_desc, num_active_loras):
        return SimpleNamespace(req_ids=["r"], num_computed_tokens_np=[0], query_start_loc_np=[0, 2])


class Steering:
    """The worker's side as the hooks see it."""

    def __init__(self, body, live):
        self.config = SimpleNamespace(body=body)
        self.device, self.layers, self.twins = torch.device("cuda"), [None] * LAYERS, True
        self.steps = {"FULL": 0, "FULL steered": 0}
        self.router = SimpleNamespace(quiet=not live, concerns=lambda ids: "r" in ids)
        self.stepped = 0
        self.expect = lambda ids: worker.WorkerSteering.expect(self, ids)

    def step(self, *_):
        self.stepped += 1


def test_a_step_with_another_graph_than_asked_for_does_not_run(monkeypatch):
    switch = Switch()
    monkeypatch.setattr(worker, "SWITCH", switch)
    runner, steering = V2Runner(), Steering("kernel", live=True)
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    assert worker._follow(runner, steering, config)
    assert runner.lora_capture_cases == [0, 1]

    def step(ids, adapters, dummy=False):
        output = SimpleNamespace(num_scheduled_tokens=ids)
        runner.gather_batch_req_state(output, dummy)
        mode = SimpleNamespace(name="FULL")
        runner.prepare_inputs(
            output, None, SimpleNamespace(cg_mode=mode, num_active_loras=adapters), 0
        )

    step({"r": 2}, 1)
    step({"other": 2}, 0)
    assert steering.steps == {"FULL": 1, "FULL steered": 1}
    for ids, adapters in (({"r": 2}, 0), ({"other": 2}, 1)):
        with pytest.raises(SteeringError, match="does not match"):
            step(ids, adapters)
    step({"r": 2}, 0, dummy=True)


def test_without_twins_the_operator_always_runs(monkeypatch):
    switch = Switch()
    monkeypatch.setattr(worker, "SWITCH", switch)
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=2))
    steering = Steering("kernel", live=True)
    assert not worker._follow(V2Runner(), steering, config)
    assert switch.on
    switch.on = False
    steering.expect(["nobody"])
    assert switch.on


def refusing(**changes):
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            use_ubatching=False,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
        ),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False)),
        model_config=SimpleNamespace(is_encoder_decoder=False, enable_sleep_mode=False),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        speculative_config=None,
    )
    for path, value in changes.items():
        *owners, name = path.split("__")
        place = config
        for owner in owners:
            place = getattr(place, owner)
        setattr(place, name, value)
    return config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__use_ubatching": True}, "dual-batch overlap"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context"),
        ({"compilation_config__pass_config__enable_sp": True}, "sequence parallelism"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_config__enable_sleep_mode": True}, "sleep mode"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "fast prefill"),
    ],
)
def test_set_ups_that_cannot_be_served_are_refused_by_name(change, words):
    worker.check_supported(refusing())
    with pytest.raises(SteeringError, match=words):
        worker.check_supported(refusing(**change))


def test_layers_are_found_by_structure_or_not_at_all():
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class Attention(nn.Module, AttentionLayerBase):
        def get_attn_backend(self): ...
        def get_kv_cache_spec(self, vllm_config): ...

    def blocks(count, attention=True):
        made = [nn.Sequential(Attention() if attention else nn.Identity()) for _ in range(count)]
        return nn.ModuleList(made)

    model = nn.Module()
    model.tower, model.layers = blocks(3, attention=False), blocks(3)
    assert worker.find_layers(model, 3) == list(model.layers)
    with pytest.raises(SteeringError, match="found \\[\\]"):
        worker.find_layers(model, 4)
    model.twin = blocks(3)
    with pytest.raises(SteeringError, match="layers', 'twin"):
        worker.find_layers(model, 3)


def test_a_process_without_the_plugin_cannot_store_graphs_under_the_steered_key():
    """`additional_config` alone is not enough of a key: seen on an H200."""
    from vllm.config.vllm import VllmConfig

    install.register()
    unloaded = VllmConfig.compute_hash.__wrapped__
    steered = VllmConfig(additional_config={CONFIG_KEY: PluginConfig().to_wire()})
    assert steered.compute_hash() != unloaded(steered)
    assert steered.compute_hash() == steered.compute_hash()
    for other in (None, {"mine": 1}):
        plain = VllmConfig(additional_config=other or {})
        assert plain.compute_hash() == unloaded(plain)
    others = [
        VllmConfig(additional_config={CONFIG_KEY: PluginConfig(**changes).to_wire()})
        for changes in ({"body": "traced"}, {"lanes": 2}, {"capture_rows": 8})
    ]
    assert len({config.compute_hash() for config in (steered, *others)}) == 4


def test_an_engine_whose_plugin_would_not_load_is_refused_before_it_starts(monkeypatch):
    install.check_entry_point()
    for value in ("", "other"):
        monkeypatch.setenv("VLLM_PLUGINS", value)
        with pytest.raises(EngineError, match="VLLM_PLUGINS"):
            start_llm("nowhere", None, VllmSettings(), PluginConfig())
    monkeypatch.setenv("VLLM_PLUGINS", "other,spo_steering")
    install.check_entry_point()
    monkeypatch.setattr(install.importlib.metadata, "entry_points", lambda group: [])
    with pytest.raises(EngineError, match="install this one"):
        start_llm("nowhere", None, VllmSettings(), PluginConfig())
