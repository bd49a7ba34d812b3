"""Every public format on rows of our own in the same layout, and the first bad row of each."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spo.config import DatasetConfig
from spo.datasets import CHECKS, load_prompts
from spo.errors import DataError
from spo.records import Prompt, PromptFormat, PromptKind, Split

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
PUBLIC: list[tuple[str, dict[str, Any], int]] = [
    ("prompts/real-toxicity-prompts/toxic.jsonl", {"format": "real_toxicity_prompts"}, 1196),
    ("prompts/refusal-direction/advbench.csv", {"format": "advbench"}, 520),
    ("prompts/harmbench-advbench/harmbench_behaviors_text_all.csv", {"format": "harmbench"}, 400),
    ("prompts/jailbreakbench/jbb_benign-behaviors.csv", {"format": "jailbreakbench"}, 100),
    ("prompts/jailbreakbench/mini_JailBreakV_28K.csv", {"format": "jailbreakv"}, 280),
    ("prompts/harmbench-advbench/strongreject_dataset.csv", {"format": "strongreject"}, 313),
    ("prompts/xstest/xstest_prompts.csv", {"format": "xstest"}, 450),
    ("prompts/figstep/SafeBench-Tiny.csv", {"format": "figstep"}, 50),
    (
        "prompts/mmsafetybench-text/mmsafety_test.json",
        {"format": "mm_safetybench", "variant": "text"},
        80,
    ),
    (
        "images/flickr8k-1000/captions_all_8091.csv",
        {"format": "captions", "skip_missing_images": True},
        5000,
    ),
]


def load(path: Path, **options: Any) -> list[Prompt]:
    config = DatasetConfig(path=str(path), **options)
    return load_prompts(config, cache=path.parent / "cache", split=Split.HELDOUT)


def written(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 10, 10)).save(path)
    return path


def toxicity_row(text: str, score: float | None, **more: Any) -> dict[str, Any]:
    return {
        "filename": "x.txt",
        "challenging": False,
        "prompt": {"text": text, "toxicity": score},
        "continuation": {"text": " and so on", "toxicity": 0.7},
        **more,
    }


def test_real_toxicity_prompts(tmp_path: Path) -> None:
    rows = [toxicity_row("You mean", 0.9), toxicity_row("The sun", None)]
    path = written(tmp_path / "rtp.jsonl", rows)
    first, second = load(path, format="real_toxicity_prompts")
    assert (first.kind, second.kind) == (PromptKind.HARM, PromptKind.BENIGN)
    assert first.format is PromptFormat.PLAIN
    assert first.split is Split.HELDOUT
    assert first.reference == " and so on"
    full = load(path, format="real_toxicity_prompts", variant="full")
    assert [p.text for p in full] == ["You mean and so on", "The sun and so on"]
    assert [p.kind for p in full] == [PromptKind.HARM] * 2


CSV_CASES: list[tuple[str, Mapping[str, str], Mapping[str, Any]]] = [
    ("advbench", {"goal": "Do it", "target": "Sure"}, {"text": "Do it", "reference": "Sure"}),
    (
        "harmbench",
        {
            "Behavior": "Do, it",
            "FunctionalCategory": "contextual",
            "SemanticCategory": "illegal",
            "Tags": "",
            "ContextString": "Once",
            "BehaviorID": "do_it",
        },
        {
            "text": "Once\n\n---\n\nDo, it",
            "prompt_id": "harmbench-file-do_it",
            "category": "illegal",
        },
    ),
    (
        "jailbreakbench",
        {"Index": "3", "Goal": "Do it", "Target": "Sure", "Behavior": "b", "Category": "c"},
        {"prompt_id": "jailbreakbench-file-3", "kind": PromptKind.HARM, "category": "c"},
    ),
    (
        "jailbreakv",
        {"id": "0", "jailbreak_query": "q", "redteam_query": "r", "format": "Template"},
        {"text": "q", "reference": "r", "category": "Template"},
    ),
    (
        "strongreject",
        {"category": "c", "source": "s", "forbidden_prompt": "f"},
        {"text": "f", "kind": PromptKind.HARM},
    ),
    (
        "xstest",
        {"id": "1", "prompt": "How?", "type": "homonyms", "label": "safe"},
        {"kind": PromptKind.BENIGN, "category": "homonyms"},
    ),
    (
        "xstest",
        {"id": "1", "prompt": "How?", "type": "contrast_homonyms"},
        {"kind": PromptKind.HARM},
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), CSV_CASES)
def test_csv_formats(
    tmp_path: Path, name: str, row: Mapping[str, str], expected: Mapping[str, Any]
) -> None:
    (prompt,) = load(written(tmp_path / "file.csv", [row]), format=name)
    assert {field: getattr(prompt, field) for field in expected} == expected


@pytest.mark.parametrize(("name", "row", "expected"), CSV_CASES)
def test_first_bad_row_is_named(
    tmp_path: Path, name: str, row: Mapping[str, str], expected: Mapping[str, Any]
) -> None:
    column = next(c for c in row if row[c] in ("Do it", "Do, it", "q", "f", "How?"))
    path = written(tmp_path / "file.csv", [row, {**row, column: " "}])
    with pytest.raises(DataError, match=rf"file\.csv:3: column '{column}' must hold text"):
        load(path, format=name)
    missing = written(tmp_path / "other.csv", [{"something": "else"}])
    with pytest.raises(DataError, match=r"other\.csv:2: expected a column .*found \['something'\]"):
        load(missing, format=name)


def test_ids_must_differ(tmp_path: Path) -> None:
    row = {"id": "1", "prompt": "How?", "type": "homonyms", "label": "safe"}
    path = written(tmp_path / "x.csv", [row, row])
    with pytest.raises(DataError, match=r"x\.csv:3: id '1' occurs twice, first at x\.csv:2"):
        load(path, format="xstest")


def test_broken_csv_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("goal,target\na,b\nc,d,e\n")
    with pytest.raises(DataError, match=r"x\.csv:3: expected 2 columns"):
        load(path, format="advbench")
    path.write_text('goal,target\n"a" x,b\n')
    with pytest.raises(DataError, match=r"x\.csv, after line 1: not CSV"):
        load(path, format="advbench")
    path.write_bytes(b"goal,target\n\xff\xfe,b\n")
    with pytest.raises(DataError, match="expected UTF-8"):
        load(path, format="advbench")


def test_figstep_finds_its_pictures(tmp_path: Path) -> None:
    row = {
        "dataset": "ForbidQI",
        "category_id": "1",
        "task_id": "2",
        "category_name": "Fraud",
        "question": "How to?",
        "instruction": "Steps to.",
    }
    path = written(tmp_path / "question" / "safebench.csv", [row])
    with pytest.raises(DataError, match=r"picture 'query_ForbidQI_1_2_6\.png' is not in"):
        load(path, format="figstep")
    file = picture(tmp_path / "images" / "SafeBench" / "query_ForbidQI_1_2_6.png")
    (prompt,) = load(path, format="figstep")
    assert (prompt.image, prompt.reference) == (str(file), "Steps to.")
    (plain,) = load(path, format="figstep", variant="text")
    assert (plain.image, plain.text) == (None, "How to?")


def test_mm_safetybench_both_layouts(tmp_path: Path) -> None:
    item = {
        "Question": "q",
        "Changed Question": "changed",
        "Key Phrase": "phrase",
        "Rephrased Question": "typo",
        "Rephrased Question(SD)": "sd",
    }
    folder = tmp_path / "data"
    written(folder / "processed_questions" / "02-HateSpeech.json", {"0": item})
    written(folder / "processed_questions" / "06-Fraud.json", {"0": item})
    for scenario in ("02-HateSpeech", "06-Fraud"):
        picture(folder / "imgs" / scenario / "SD_TYPO" / "0.jpg")
    found = load(folder / "processed_questions", format="mm_safetybench")
    assert [(p.text, p.category) for p in found] == [
        ("typo", "02-HateSpeech"),
        ("typo", "06-Fraud"),
    ]
    subset = written(tmp_path / "subset.json", {"06-Fraud#7": item})
    (prompt,) = load(subset, format="mm_safetybench", variant="text")
    assert (prompt.text, prompt.category, prompt.image) == ("changed", "06-Fraud", None)
    del item["Rephrased Question(SD)"]
    with pytest.raises(DataError, match=r"subset\.json\[06-Fraud#7\]: expected a column"):
        load(written(subset, {"06-Fraud#7": item}), format="mm_safetybench", variant="SD")


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_mmbench(tmp_path: Path) -> None:
    encoded = base64.b64encode(picture(tmp_path / "p.png").read_bytes()).decode()
    row = {
        **{"index": "241", "question": "Which?", "hint": "Look.", "A": "a cat", "B": "two dogs"},
        **{"C": "nan", "D": "", "answer": "B", "category": "count", "image": encoded},
    }
    turned = {**row, "index": "1000241", "image": "241"}
    (prompt,) = load(table(tmp_path / "m.tsv", [row, turned]), format="mmbench")
    assert prompt.text == (
        "Look.\nWhich?\nOptions:\nA. a cat\nB. two dogs\n"
        "Answer with the letter of the right option."
    )
    assert (prompt.reference, prompt.category, prompt.kind) == ("B", "count", PromptKind.BENIGN)
    assert prompt.image is not None
    assert Path(prompt.image).read_bytes() == (tmp_path / "p.png").read_bytes()
    for change, message in (
        ({"answer": "C"}, "must be one of"),
        ({"B": ""}, "at least the options A and B"),
        ({"image": "no picture!"}, "in base64"),
        ({"index": "x"}, "must be a number"),
    ):
        with pytest.raises(DataError, match=rf"m\.tsv:3: .*{message}"):
            load(
                table(tmp_path / "m.tsv", [row, {**row, "index": "7", **change}]), format="mmbench"
            )


def test_mmvet(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "v1_0.png")
    row = {"imagename": "v1_0.png", "question": "x?", "answer": "-1<AND>-5", "capability": ["ocr"]}
    (prompt,) = load(written(tmp_path / "mm-vet.json", {"v1_0": row}), format="mmvet")
    assert (prompt.reference, prompt.category) == ("-1<AND>-5", "ocr")
    with pytest.raises(DataError, match=r"\[v1_0\]: .*'capability' must be a list"):
        load(written(tmp_path / "mm-vet.json", {"v1_0": {**row, "capability": 1}}), format="mmvet")


@pytest.mark.parametrize(
    ("answer", "correct", "answered"),
    [
        ("B", 1, 1),
        ("(b) two dogs", 1, 1),
        ("The answer is B.", 1, 1),
        ("I see two dogs here", 1, 1),
        ("A", 0, 1),
        ("A dog and another", 0, 0),
        ("a cat and two dogs", 0, 0),
        ("Both of them", 0, 0),
        ("The answer is a mouse", 0, 0),
        ("E", 0, 0),
        ("", 0, 0),
    ],
)
def test_choices_are_checked(answer: str, correct: int, answered: int) -> None:
    prompt = Prompt(
        prompt_id="p",
        text="Which?\nOptions:\nA. a cat\nB. two dogs",
        kind=PromptKind.BENIGN,
        reference="B",
    )
    assert CHECKS["mmbench"](prompt, answer) == {"correct": correct, "answered": answered}


@pytest.mark.parametrize(
    ("reference", "answer", "contained"),
    [
        ("x=-1<AND>x=-5", "The roots are x = -1 and x=-5.", 1),
        ("x=-1<AND>x=-5", "x=-1", 0),
        ("a cat<OR>a kitten", "It is A KITTEN!", 1),
        ("cat", "concatenate", 0),
        ("14", "", 0),
    ],
)
def test_references_are_looked_for(reference: str, answer: str, contained: int) -> None:
    prompt = Prompt(prompt_id="p", text="q", kind=PromptKind.BENIGN, reference=reference)
    assert CHECKS["mmvet"](prompt, answer) == {"contained": contained}


def test_vlguard(tmp_path: Path) -> None:
    picture(tmp_path / "bad_ads" / "a.png")
    safe = {
        "id": "a",
        "image": "bad_ads/a.png",
        "safe": True,
        "instr-resp": [
            {"safe_instruction": "What?", "response": "An ad."},
            {"unsafe_instruction": "Hack?", "response": "No."},
        ],
    }
    unsafe = {
        "id": "b",
        "image": "bad_ads/a.png",
        "safe": False,
        "harmful_category": "deception",
        "instr-resp": [{"instruction": "Lie", "response": "No."}],
    }
    found = load(written(tmp_path / "test.json", [safe, unsafe]), format="vlguard")
    assert [(p.text, p.kind.value) for p in found] == [
        ("What?", "benign"),
        ("Hack?", "harm"),
        ("Lie", "harm"),
    ]
    with pytest.raises(DataError, match=r"test\.json\[1\]: field 'safe' must be true or false"):
        load(written(tmp_path / "test.json", [safe, {**unsafe, "safe": "no"}]), format="vlguard")
    broken = {**unsafe, "instr-resp": [{"text": "Lie"}]}
    with pytest.raises(DataError, match=r"instr-resp\[0\]: expected a column 'instruction'"):
        load(written(tmp_path / "test.json", [broken]), format="vlguard")


def test_captions_with_bars_or_commas(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "1.jpg")
    path = written(tmp_path / "captions.csv", [{"image": "1.jpg", "caption": "A dog, running ."}])
    (prompt,) = load(path, format="captions")
    assert (prompt.reference, prompt.kind) == ("A dog, running .", PromptKind.BENIGN)
    path.write_text("image_name| comment_number| comment\n1.jpg| 0| Two dogs , one ball .\n")
    (prompt,) = load(path, format="captions")
    assert prompt.reference == "Two dogs , one ball ."
    path.write_text("image,caption\n1.jpg,a\n2.jpg,b\n")
    with pytest.raises(DataError, match=r"captions\.csv:3: picture '2\.jpg'"):
        load(path, format="captions")
    assert len(load(path, format="captions", skip_missing_images=True)) == 1


def parquet_rows() -> list[dict[str, Any]]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (0, 0, 255)).save(buffer, format="PNG")
    encoded = {"bytes": buffer.getvalue(), "path": None}
    return [
        {"question": "a", "image": encoded, "unsafe": "1"},
        {"question": "b", "image": None, "unsafe": "0"},
    ]


MAPPING = {"columns": {"text": "question", "label": "unsafe"}, "harm_labels": ("1",)}


def test_parquet_keeps_encoded_pictures(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(parquet_rows()), path)
    first, second = load(path, format="table", **MAPPING)
    assert first.image is not None
    assert Image.open(first.image).getpixel((0, 0)) == (0, 0, 255)
    assert (first.kind, second.kind, second.image) == (PromptKind.HARM, PromptKind.BENIGN, None)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read after row 0"):
        load(path, format="table", **MAPPING)


def test_hub_layout_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(parquet_rows()), folder / "test-00000-of-00001.parquet")
    first, second = load(tmp_path / "set", format="hub", split="test", **MAPPING)
    assert (first.text, second.text) == ("a", "b")
    assert first.image is not None
    assert Image.open(first.image).size == (8, 8)
    with pytest.raises(DataError, match="split 'other'"):
        load(tmp_path / "set", format="hub", split="other", **MAPPING)
    with pytest.raises(DataError, match=r"\[test\] row 0: expected a column 'nothing'"):
        load(tmp_path / "set", format="hub", split="test", columns={"text": "nothing"}, kind="harm")


def test_tables_and_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "h.json", [{"instruction": "Bake", "category": None}])
    (prompt,) = load(path, format="table", columns={"text": "instruction"}, kind="benign")
    assert (prompt.text, prompt.category) == ("Bake", "")
    lines = tmp_path / "l.txt"
    lines.write_text("one\n\ntwo\n")
    assert [p.text for p in load(lines, format="table", kind="harm")] == ["one", "two"]
    path.write_text('[{"instruction": "Ba')
    with pytest.raises(DataError, match=r"h\.json:1: not JSON .*cut short"):
        load(path, format="table", columns={"text": "instruction"}, kind="benign")


def test_drawing_keeps_order_and_depends_on_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "l.txt"
    path.write_text("\n".join(f"line {i}" for i in range(40)))
    config = DatasetConfig(format="table", path=str(path), kind="harm", rows=10)
    one, other = (load_prompts(config, cache=tmp_path, seed=seed) for seed in (0, 1))
    assert len(one) == 10
    assert one != other
    assert one == load_prompts(config, cache=tmp_path, seed=0)
    numbers = [int(p.text.split()[1]) for p in one]
    assert numbers == sorted(numbers)
    with pytest.raises(DataError, match="no row of kind benign in 40 rows"):
        load_prompts(config.model_copy(update={"select": PromptKind.BENIGN}), cache=tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "figstep", "variant": "SD"},
        {"format": "advbench", "columns": {"text": "goal"}},
        {"format": "table", "columns": {"text": "goal"}},
        {"format": "table", "kind": "harm", "columns": {"label": "x"}},
        {"format": "table", "kind": "harm", "columns": {"words": "x"}},
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"variant|columns|harm_labels|kind"):
        DatasetConfig(path="x", **options)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "gone.csv", format="advbench")
    with pytest.raises(DataError, match="holds no file"):
        load(tmp_path, format="mm_safetybench")


@pytest.mark.parametrize(
    ("name", "options", "count"), [case for case in PUBLIC if (DATA / case[0]).is_file()]
)
def test_published_files(name: str, options: dict[str, Any], count: int, tmp_path: Path) -> None:
    prompts = load_prompts(DatasetConfig(path=str(DATA / name), **options), cache=tmp_path)
    assert len(prompts) == count
    assert len({prompt.prompt_id for prompt in prompts}) == count
