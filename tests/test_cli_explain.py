"""`qwenref explain` as it is typed: exit status, last lines, JSON, options, and what is refused."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import DATA
from helpers import TINY, Cli

import qwenref
from qwenref.stages import LAYER
from qwenref.trial.explain import explain_layers

MODEL = ("--model", TINY)
PREFIX = "qwenref: error: "
IDS = [87, 104, 97, 116, 32, 105, 115, 32, 50, 43, 50, 63]
TOKENS = ("--tokens", ",".join(map(str, IDS)))

Refused = Callable[..., str]


@pytest.fixture
def explain(cli: Cli) -> Cli:
    """Run `qwenref explain ARGS` in a directory that holds the golden dumps under short names."""
    for folder in DATA.iterdir():
        Path(folder.name).symlink_to(folder)
    return functools.partial(cli, "explain")


@pytest.fixture
def refused(explain: Cli) -> Refused:
    """Run a command that must be refused in one line; return what the line says."""

    def run(*arguments: object) -> str:
        status, out, err = explain(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith(PREFIX)
        assert err[:-1].isprintable()
        return err[:-1].removeprefix(PREFIX)

    return run


def dumped(name: str, tokens: list[int], *stages: str) -> Path:
    """Write what we compute as another engine would: no manifest."""
    folder = Path(name) / "layer-0"
    folder.mkdir(parents=True)
    for stage, values in qwenref.run(TINY, tokens)._asdict().items():
        if not stages or stage in stages:
            qwenref.write_aprt(folder / f"{stage}.bin", 0, values)
    return Path(name)


def test_a_healthy_dump(explain: Cli) -> None:
    status, out, err = explain("apr-f32", *MODEL)
    assert (status, err) == (0, "")
    *_, last, computes = out.splitlines()
    assert last == "AGREE: layer 0: every stage follows from what it was computed from"
    assert computes == (
        "Your engine computes: norm, projections, RoPE, attention, MLP and residual: float32."
    )


def test_a_faulty_dump(explain: Cli) -> None:
    status, out, err = explain("apr-rope-interleaved", *MODEL)
    assert (status, err) == (1, "")
    assert "FAULT: layer 0: q_post_rope and k_post_rope add the error (0.65 and 0.73; " in out
    assert "What is 2+2?" in out, "the prompt was assumed, and that is said"


def test_quiet_prints_the_last_lines(explain: Cli) -> None:
    status, out, _ = explain("apr-rope-interleaved", *MODEL, "-q")
    assert status == 1
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        "FAULT",
        "Cause",
        "Your engine computes",
    ]


def test_json_is_what_python_returns(explain: Cli) -> None:
    status, out, _ = explain("apr-f32", *MODEL, "--json")
    assert status == 0
    found = json.loads(out)
    assert found == json.loads(qwenref.explain("apr-f32", model=TINY).to_json())
    assert found["schema"] == "qwenref-explain-v1"
    assert found["tokens"] == IDS
    assert [stage["stage"] for stage in found["stages"]] == [
        "embedding",
        *(stage.name for stage in LAYER),
    ]
    assert set(found["stages"][0]) >= {
        *("stage", "status", "dtype", "total", "added", "floor", "ratio", "worst", "pattern"),
        *("layout", "dialects", "cause", "equivalent", "hidden"),
    }


def test_names_of_another_engine(explain: Cli) -> None:
    status, _, err = explain("llama-f32-native", *MODEL, "--names", "llama.cpp", "-q")
    assert (status, err) == (0, "")


def test_exact_weights(explain: Cli) -> None:
    dump, model = "apr-q4k", wide("model")
    assert explain(dump, "--model", model, "-q")[0] == 0
    assert explain(dump, "--model", model, "-q", "--exact-weights")[0] == 1


def wide(name: str) -> Path:
    from qwenref.model.random_checkpoint import Shape, write

    write(Path(name), Shape(256, 4, 2, 512, 2, 320, seed=26))
    return Path(name)


def test_a_reference(explain: Cli) -> None:
    status, out, _ = explain("apr-f32", *MODEL, "--reference", "apr-rope-interleaved")
    assert status == 0
    assert out.splitlines()[-1] == "It is the reference that is wrong."


def test_layers(explain: Cli, refused: Refused) -> None:
    assert explain("apr-f32", *MODEL, "--layers", "2", "-q")[0] == 0
    assert "layer 3 does not exist" in refused("apr-f32", *MODEL, "--layers", "3")
    assert "no stage of layer 1" in refused("llama-f32", *MODEL, "--layers", "1")


def test_all_layers(explain: Cli) -> None:
    status, out, err = explain("apr-f32", *MODEL, "--layers", "all")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert {line.split()[1] for line in lines if line.startswith(("ffn_", "attn_"))} == {"..."}
    assert next(line for line in lines if line.startswith("AGREE")) == (
        "AGREE: layers 0 to 2 and the head agree: every stage follows from what it was computed "
        "from"
    )


def test_json_of_all_layers_is_what_python_returns(explain: Cli) -> None:
    _, out, _ = explain("apr-f32", *MODEL, "--layers", "1..3", "--json")
    found = json.loads(out)
    assert found == json.loads(explain_layers("apr-f32", model=TINY, layers=[1, 2]).to_json())
    assert found["schema"] == "qwenref-explain-layers-v1"
    assert [part["layer"] for part in found["parts"]] == [1, 2]


def test_what_was_not_dumped_is_said(explain: Cli) -> None:
    status, out, _ = explain("llama-f32", *MODEL, "--layers", "all", "-q")
    assert (status, out.splitlines()[0]) == (
        *(2, "INCOMPLETE: nothing was dumped of layers 1 to 2 and the head"),
    )


def test_tokens_of_another_number_are_incomparable_and_recovered(explain: Cli) -> None:
    dumped("dump", [300, *IDS])
    status, out, _ = explain("dump", *MODEL)
    assert status == 2
    last = out.splitlines()[-1]
    assert last.startswith("INCOMPARABLE: the dump has 13 tokens, and the prompt 12: ")
    assert "300 was put in front (a BOS?)" in last
    assert explain("dump", *MODEL, "--tokens", ",".join(map(str, [300, *IDS])))[0] == 0


def test_tokens_that_cannot_be_recovered(explain: Cli) -> None:
    dumped("dump", [300, *IDS], "attn_softmax")
    status, out, _ = explain("dump", *MODEL)
    assert status == 2
    assert out.splitlines()[-1] == ("INCOMPARABLE: the dump has 13 tokens, and the prompt 12")


@pytest.mark.parametrize(
    ("ran", "said"),
    [
        ([300, *IDS[:-1]], "300 was put in front (a BOS?)"),
        ([*IDS[1:], 5], "the first token is missing"),
        (IDS[::-1], "the same tokens in another order"),
        ([7, *IDS[1:]], f"not {IDS}"),
    ],
)
def test_other_tokens_of_equal_number_are_a_fault(explain: Cli, ran: list[int], said: str) -> None:
    dumped("dump", ran)
    status, out, _ = explain("dump", *MODEL, *TOKENS, "--json")
    found = json.loads(out)
    assert (status, found["verdict"], found["origins"]) == (1, "fault", ["attn_norm"])
    assert found["tokens_recovered"] == ran
    assert said in " ".join(found["summary"])


def test_an_embedding_of_other_tokens_is_where_it_begins(explain: Cli) -> None:
    shutil.copytree("apr-f32", "dump")
    ran = [5, *IDS[1:]]
    status, out, _ = explain("dump", *MODEL, "--tokens", ",".join(map(str, ran)), "--json")
    found = json.loads(out)
    assert (status, found["origins"], found["tokens_recovered"]) == (1, ["embedding"], IDS)


def test_prompt_and_manifest(explain: Cli, cli: Cli) -> None:
    assert cli("capture", "--prompt", "Hello", "-o", "ours", "-q")[0] == 0
    status, out, _ = explain("ours", *MODEL)
    assert status == 0
    assert "5 tokens 72, 101, 108, 108, 111, as its manifest says" in out
    assert explain("ours", *MODEL, "--prompt", "Hello", "-q")[0] == 0
    assert explain("ours", *MODEL, "--prompt", "Hallo", "-q")[0] == 1
    assert explain("ours", "-q")[0] == 2


def test_only_the_last_token(explain: Cli) -> None:
    folder = Path("dump/layer-0")
    folder.mkdir(parents=True)
    for stage, values in qwenref.run(TINY, IDS)._asdict().items():
        last = values[:, -1] if stage in ("attn_scores", "attn_softmax") else values[-1]
        qwenref.write_aprt(folder / f"{stage}.bin", 0, last)
    status, out, _ = explain("dump", *MODEL, "--json")
    found = json.loads(out)
    assert (status, found["verdict"]) == (0, "agree")
    assert {stage["layout"] for stage in found["stages"]} == {"last token"}
    values = qwenref.read_aprt(folder / "attention.bin").values.copy()
    values[20] += 1
    qwenref.write_aprt(Path("dump/layer-0/other.bin"), 0, values)
    shutil.move("dump/layer-0/other.bin", folder / "attention.bin")
    found = json.loads(explain("dump", *MODEL, "--json")[1])
    assert found["origins"] == ["attention"]
    assert found["stages"][7]["pattern"] == "one element: token 11, head 1, channel 6"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("apr-f32",), "has no manifest: give the checkpoint"),
        (("nothing", *MODEL), "nothing"),
        (("apr-f32", "--model", "nothing"), "does not exist"),
        (("apr-f32", *MODEL, *TOKENS, "--prompt", "x"), "use one of them"),
        (("apr-f32", *MODEL, "--tokens", "1,99999"), "token id 99999 is out of range"),
        (("apr-f32", *MODEL, "--device", "abacus"), "unknown device"),
        (("apr-q4k", *MODEL), "no file of apr-q4k is of a size that"),
    ],
)
def test_what_cannot_be_used_is_refused(
    refused: Refused, arguments: tuple[Any, ...], said: str
) -> None:
    assert said in refused(*arguments)


@pytest.mark.parametrize("layers", ["0", "all"])
def test_a_file_of_another_layer_is_no_fault_of_the_engine(refused: Refused, layers: str) -> None:
    shutil.copytree("apr-f32", "dump")
    shutil.copy("apr-f32/layer-2/ffn_up.bin", "dump/layer-1/ffn_up.bin")
    assert (
        "ffn_up of layer 1 of dump says in its header that it is of layer 2: correct the name or "
        "the header"
    ) in refused("dump", *MODEL, "--layers", layers)


def test_layers_of_a_prompt_of_another_length(explain: Cli) -> None:
    status, out, err = explain("apr-f32", *MODEL, "--tokens", "1,2,3", "--layers", "all")
    assert (status, err) == (2, "")
    *_, before, last = out.splitlines()
    assert before == ""
    assert last.startswith("INCOMPARABLE: layer 0: the dump has 12 tokens, and the prompt 3")


def test_a_file_that_fits_nothing_is_named(explain: Cli) -> None:
    shutil.copytree("apr-f32", "dump", ignore=shutil.ignore_patterns("layer-1", "layer-2"))
    path = Path("dump/layer-0/attn_scores.bin")
    path.unlink()
    qwenref.write_aprt(path, 0, np.zeros(77, np.float32))
    status, out, _ = explain("dump", *MODEL, "--json")
    found = json.loads(out)
    (scores,) = (stage for stage in found["stages"] if stage["stage"] == "attn_scores")
    assert scores["status"] == "unmeasured"
    assert scores["reason"] == "77 values, but 12 tokens make 864"
    assert (status, found["verdict"]) == (0, "agree"), "softmax bridges it"
