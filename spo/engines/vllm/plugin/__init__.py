"""Steering inside vLLM: per request, in the compiled graph, hot-swappable, prefix-cache safe.

`install.register` is the `vllm.general_plugins` entry point. It does nothing unless the engine was
started with `additional_config={"spo_steering": {...}}`; that entry also salts vLLM's compile
cache, without which a stale graph would silently serve the unsteered model.

The engine's process speaks to the workers by `collective_rpc` (publish, receipts, captures) and by
`SamplingParams.extra_args["spo"]` (what a request asks for); see `wire`.
"""
