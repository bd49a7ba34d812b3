"""Configuration: every mistake names its key, and every shipped file loads."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest
import yaml

from spo.config import RunConfig, load_config
from spo.config.attacks import AnyAttack, PgdConfig
from spo.config.evaluation import DEFENCES, DefenceConfig
from spo.config.load import split_override
from spo.config.text import dump, parse
from spo.errors import ConfigError
from spo.records import Operator

ROOT = Path(__file__).resolve().parents[3]
# A sweep file is a search space over one of the run files and is read by `spo.sweep`.
RUN_FILES = sorted(p for p in (ROOT / "tune_configs").glob("*.yaml") if "sweep" not in p.name)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_are_valid() -> None:
    assert load_config() == RunConfig()


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda p: p.name)
def test_every_shipped_file_loads(path: Path) -> None:
    config = load_config(path)
    assert config.name


def test_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "name: mine\nlearn:\n  steps: 7\n  objective: dpo\n")
    config = load_config(path, ["learn.steps=9", "steering.operator=adaptive", "engine.backend=hf"])
    assert (config.name, config.learn.steps, config.learn.objective) == ("mine", 9, "dpo")
    assert config.steering.operator is Operator.ADAPTIVE
    assert config.engine.backend == "hf"


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("learn.learning_rate=1e-4", lambda c: c.learn.learning_rate, 1e-4),
        ("learn.learning_rate=2E-3", lambda c: c.learn.learning_rate, 2e-3),
        ("learn.use_gpu=true", lambda c: c.learn.use_gpu, True),
        ("learn.use_gpu=false", lambda c: c.learn.use_gpu, False),
        ("estimate.layers=[3, 5]", lambda c: c.estimate.layers, (3, 5)),
        ("estimate.layers=null", lambda c: c.estimate.layers, None),
        ("estimate.depth_window=[1e-1, 9e-1]", lambda c: c.estimate.depth_window, (0.1, 0.9)),
        ("model.id=org/name=x", lambda c: c.model.id, "org/name=x"),
        ("model.revision=", lambda c: c.model.revision, None),
        ("name=experiment-e", lambda c: c.name, "experiment-e"),
        ("output_dir=some where/é", lambda c: c.output_dir, "some where/é"),
    ],
)
def test_values_of_overrides(override: str, read: object, expected: object) -> None:
    value = read(load_config(None, [override]))  # type: ignore[operator]
    assert value == expected
    assert type(value) is type(expected)


def test_exponent_in_a_file_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text."""
    config = load_config(write(tmp_path, "learn:\n  learning_rate: 1e-4\n"))
    assert config.learn.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("learn.step=3", "learn.step:"),
        ("lern.steps=3", "lern:"),
        ("learn.steps=0", "learn.steps:"),
        ("learn.steps=many", "learn.steps:"),
        ("learn.objective=ppo", "learn.objective:"),
        ("rollout.group_size=1", "rollout.group_size:"),
        ("steering.coefficient=.inf", "steering.coefficient:"),
        ("steering.coefficient=-1", "steering.coefficient:"),
        ("evaluate.attacks=[{epsilon_255: 300}]", "evaluate.attacks.0.epsilon_255:"),
        ("evaluate.attacks=[{kind: template, stepps: 3}]", "evaluate.attacks.0.stepps:"),
        ("reward.parts=[{kind: toxicity}]", "reward.parts.0.weight:"),
        ("reward.parts=[{kind: zap, weight: 1}]", "reward.parts.0.kind:"),
        ("extract.sources=[{kind: file}]", "extract.sources.0"),
        ("extract.sources=[{kind: continuation, path: x.jsonl}]", "extract.sources.0"),
        ("learn=3", "learn:"),
    ],
)
def test_the_key_at_fault_is_named(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        load_config(None, [override])
    assert named in str(caught.value)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "learn:\n  steps: 0\n  beta: -1\nnonsense: 1\n")
    with pytest.raises(ConfigError, match="3 setting") as caught:
        load_config(path)
    for named in ("learn.steps", "learn.beta", "nonsense", str(path)):
        assert named in str(caught.value)


@pytest.mark.parametrize("override", ["learn.steps", "=3", ""])
def test_override_without_key_or_value(override: str) -> None:
    with pytest.raises(ConfigError, match=r"expected key\.sub=value"):
        load_config(None, [override])


@pytest.mark.parametrize("override", ["estimate.layers=[1,", "name={e", "name='e", "name=@x"])
def test_override_that_is_not_yaml(override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(None, [override])


@pytest.mark.parametrize("name", ["", "a/b", "../spo", " a", "a ", "spo@1", "a\n", "x" * 65])
def test_a_defence_is_not_called_what_no_file_can_be(name: str) -> None:
    with pytest.raises(ValueError, match="a defence's name has letters"):
        DefenceConfig(name=name, reminder="Be kind.")
    assert DefenceConfig(name="my vector", reminder="Be kind.").name == "my vector"


def test_override_below_a_value() -> None:
    with pytest.raises(ConfigError, match="'name' is a value"):
        load_config(None, ["name=a", "name.b=1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"learn: [", "is not valid YAML"),
        (b"- a\n- b\n", "expected keys at the top level, got list"),
        (b"just text", "expected keys at the top level, got str"),
        (b"\xff\xfe\x00\x80", "is not valid YAML: it is not UTF-8"),
        (b"\x00\x01", "is not valid YAML"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "broken.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in ("on", "off", "yes", "no", "NO", "y")],
        *[("true", True), ("False", False), ("null", None), ("~", None), ("", None)],
        *[("1e-4", 1e-4), ("-1E4", -1e4), (".5", 0.5), ("1.0e-05", 1e-5), ("e5", "e5")],
        *[("010", 10), ("0o10", 8), ("0x1F", 31), ("1:30", "1:30"), ("'1e-4'", "1e-4")],
        *[("[1e-4, no]", [1e-4, "no"]), ("{a: 1e-3}", {"a": 1e-3})],
    ],
)
def test_values_are_read_by_the_rules_of_yaml_1_2(text: str, value: object) -> None:
    assert split_override(f"learn.steps={text}") == (["learn", "steps"], value)
    assert parse(f"key: {text}\n", "f") == {"key": value}


def test_what_is_written_is_read_back_by_either_version() -> None:
    words = ["1e5", "-1E-4", ".5e3", "1.e3", "on", "no", "010", "0o17", "1:30", "null", "", "a: b"]
    tree = {"z": words, "a": [1e-5, 1e22, -3, True, None, {"b": "é\n c"}]}
    assert parse(dump(tree), "f") == yaml.safe_load(dump(tree)) == tree
    assert list(parse(dump(tree), "f")) == ["z", "a"]
    config = RunConfig().model_dump(mode="json")
    old = yaml.safe_dump(config, sort_keys=False)
    assert parse(old, "config.yaml of an older run") == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a\nseed: 1\nname: b\n", r'line 3 is not valid YAML: found duplicate key "name"'),
        ("learn:\n  steps: 1\n  steps: 2\n", r'line 3 .*: found duplicate key "steps"'),
        ("name: a\n seed: 1\n", r"line 2 is not valid YAML: mapping values are not allowed here"),
        ("name: a\nseed: !!python/name:os.system\n", "line 2 .*: could not determine"),
        ("name: a\nseed: *b\n", "line 2 .*: found undefined alias 'b'"),
        ("name: a\n---\nseed: 1\n", "line 2 .*: but found another document"),
    ],
)
def test_an_error_in_a_file_names_its_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml, " + message) as caught:
        load_config(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_empty_file_means_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == RunConfig()


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config(None, ["learn.steps=3", "estimate.layers=[1,2]", "seed=5"])
    read = load_config(write(tmp_path, config.to_yaml()))
    assert read == config
    assert read.digest == config.digest


def test_a_later_key_that_is_not_set_leaves_digests_as_they_were() -> None:
    plain, named = RunConfig(), load_config(None, ["extract.calibration=benign.jsonl"])
    before = plain.model_dump(mode="json", include={"extract"})
    assert before["extract"].pop("calibration") is None
    for place in ("labels", "tensor_parallel_size"):  # where a process runs changes no result
        del before["extract"][place]
    text = json.dumps([before, ""], sort_keys=True)
    assert plain.digest_of("extract") == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert plain.digest_of("extract") != named.digest_of("extract")
    assert plain.digest != named.digest


def test_digest_follows_what_changes_results() -> None:
    base = load_config()
    same = [
        "learn.compile=true",
        "engine.in_process=false",
        "name=other",
        "output_dir=elsewhere",
        "cache_dir=c",
        "ray.num_cpus=2",
    ]
    different = ["seed=1", "learn.steps=21", "steering.coefficient=0.2", "model.id=x"]
    assert all(load_config(None, [o]).digest == base.digest for o in same)
    digests = {load_config(None, [o]).digest for o in different} | {base.digest}
    assert len(digests) == len(different) + 1


def test_frozen() -> None:
    config = load_config()
    with pytest.raises(pydantic.ValidationError):
        config.learn.steps = 3  # type: ignore[misc]


def test_a_url_has_a_local_mirror_of_its_own(tmp_path: Path) -> None:
    settings = ["name=r", f"cache_dir={tmp_path}", "output_dir=s3://bucket/runs/"]
    config = load_config(None, settings)
    assert config.run_url == config.storage == "s3://bucket/runs/r"
    assert config.run_dir.parent == tmp_path / "mirror"
    other = load_config(None, [*settings[:2], "output_dir=s3://bucket/others"])
    assert other.run_dir != config.run_dir
    local = load_config(None, [*settings[:2], f"output_dir={tmp_path}"])
    assert local.run_url is None
    assert local.storage == str(tmp_path / "r")


def test_run_dir_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(None, ["name=r"]).run_dir == tmp_path / "outputs" / "r"


def test_import_needs_neither_torch_nor_ray() -> None:
    code = "import sys, spo.config, spo.records, spo.errors; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    )
    loaded = set(done.stdout.replace("'", "").strip("[]\n").split(", "))
    assert "spo.config" in loaded
    assert not loaded & {"torch", "ray", "vllm", "transformers", "numpy"}


def test_offline_answers_need_an_objective_on_pairs() -> None:
    with pytest.raises(ConfigError, match=r"set learn\.objective to dpo, simpo, bipo or reps"):
        load_config(None, ["rollout.static=true"])
    load_config(None, ["rollout.static=true", "learn.objective=bipo"])


def test_a_file_is_laid_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("learn: {steps: 7, beta: 0.5}\ndata: {harm_prompts: 9}\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nlearn: {steps: 3}\n")
    config = load_config(tmp_path / "own.yaml", ["data.benign_prompts=4"])
    assert (config.learn.steps, config.learn.beta) == (3, 0.5)
    assert (config.data.harm_prompts, config.data.benign_prompts) == (9, 4)


def test_a_wrong_key_is_named_with_every_file_it_may_be_in(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("lern: {}\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\n")
    with pytest.raises(ConfigError, match=r"own.yaml with its base .*base.yaml cannot.*\n  lern"):
        load_config(tmp_path / "own.yaml")


def test_the_matrix_has_every_defence_that_documented_commands_make(repository: Path) -> None:
    assert load_config(repository / "tune_configs/matrix.yaml").evaluate.defences == DEFENCES


@pytest.mark.parametrize(
    ("base", "said"), [("own.yaml", "base of itself"), ("none.yaml", "No such"), ("[1]", "beside")]
)
def test_a_base_that_cannot_be_read_is_named(tmp_path: Path, base: str, said: str) -> None:
    (tmp_path / "own.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "own.yaml")


def test_several_pictures_are_of_one_attack_for_all_prompts() -> None:
    assert PgdConfig(pictures=3).pictures == 3
    for wrong in ({"kind": "template"}, {"target": "prompt"}):
        with pytest.raises(pydantic.ValidationError, match="'pictures' goes with"):
            pydantic.TypeAdapter(AnyAttack).validate_python({"pictures": 2, **wrong})


def test_later_keys_of_an_attack_count_only_when_they_are_set() -> None:
    attack = {"kind": "pgd", "epsilon_255": 16, "adaptive": True}

    def digest(**more: object) -> str:
        made = RunConfig.model_validate({"data": {"attacks": [attack | more]}})
        return made.digest_of("data")

    assert digest() == "dd673da6a43c414e"  # as commit f55f1cd, which had none of them, computed it
    assert digest(objective="toxic", flat_steps=0) == digest()
    assert digest(objective="compliance") != digest()
    assert digest(pairs_per_step=8) != digest()
