"""The stage table: names, order, what needs what, and how the command line names stages and layers.

Names and order are those of `apr trace --save-tensor` 0.72.3. These are the falsification tests of
the attention sub-stage contract: SUB-001 (the enumeration),
SUB-002 (the capture order), SUB-005 (capturing fewer stages never changes the others' values).
"""

import itertools
import json
import random
from pathlib import Path

import pytest
from helpers import TINY, Cli
from hypothesis import given
from hypothesis import strategies as st

from qwenref.errors import QwenrefError
from qwenref.stages import (
    ALL,
    ATTENTION,
    EMBEDDING,
    HEAD,
    LAYER,
    MAX_LAYERS,
    RESIDUAL,
    Stage,
    needed_for,
    parse_layers,
    parse_stages,
)

NINE = (
    "attn_norm",
    "qkv_matmul",
    "qkv_bias",
    "q_post_rope",
    "k_post_rope",
    "attn_scores",
    "attn_softmax",
    "attention",
    "attn_out",
)

MLP_SIX = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "ffn_out")
SEVENTEEN = (*NINE, "post_attn_residual", *MLP_SIX, "post_ffn_residual")
TWENTY = ("embedding", *SEVENTEEN, "final_norm", "lm_head")

NEEDS = {
    "attn_norm": set(),
    "qkv_matmul": {"attn_norm"},
    "qkv_bias": {"attn_norm", "qkv_matmul"},
    "q_post_rope": {"attn_norm", "qkv_matmul", "qkv_bias"},
    "k_post_rope": {"attn_norm", "qkv_matmul", "qkv_bias"},
    "attn_scores": set(NINE[:5]),
    "attn_softmax": set(NINE[:6]),
    "attention": set(NINE[:7]),
    "attn_out": set(NINE[:8]),
    "post_attn_residual": set(NINE),
    "ffn_norm": set(SEVENTEEN[:10]),
    "ffn_gate": set(SEVENTEEN[:11]),
    "ffn_up": set(SEVENTEEN[:11]),
    "ffn_silu": set(SEVENTEEN[:12]),
    "ffn_swigl": set(SEVENTEEN[:14]),
    "ffn_out": set(SEVENTEEN[:15]),
    "post_ffn_residual": set(SEVENTEEN[:16]),
}
"""For each stage all others that it takes to compute it, from the formulas of the model."""

SUBSETS = st.sets(st.sampled_from(SEVENTEEN)).map(sorted)


def named(names: list[str] | tuple[str, ...]) -> list[Stage]:
    return [stage for stage in ALL if stage.name in names]


# --- the table ------------------------------------------------------------------------------------


def test_sub_001_the_stages_are_exactly_these_nine() -> None:
    assert tuple(stage.name for stage in ATTENTION) == NINE
    assert tuple(stage.name for stage in LAYER) == SEVENTEEN
    assert tuple(stage.name for stage in ALL) == TWENTY
    assert EMBEDDING.name == "embedding"


def test_sub_002_each_stage_comes_after_what_it_is_computed_from() -> None:
    before = {RESIDUAL}
    for stage in (*LAYER, *HEAD):
        assert stage.computed_from
        assert set(stage.computed_from) <= before
        assert stage.name not in before
        before.add(stage.name)


def test_the_table_states_what_the_formulas_state() -> None:
    assert {stage.name: stage.computed_from for stage in (*LAYER, *HEAD)} == {
        "attn_norm": (RESIDUAL,),
        "qkv_matmul": ("attn_norm",),
        "qkv_bias": ("qkv_matmul",),
        "q_post_rope": ("qkv_bias",),
        "k_post_rope": ("qkv_bias",),
        "attn_scores": ("q_post_rope", "k_post_rope"),
        "attn_softmax": ("attn_scores",),
        "attention": ("attn_softmax", "qkv_bias"),
        "attn_out": ("attention",),
        "post_attn_residual": (RESIDUAL, "attn_out"),
        "ffn_norm": ("post_attn_residual",),
        "ffn_gate": ("ffn_norm",),
        "ffn_up": ("ffn_norm",),
        "ffn_silu": ("ffn_gate",),
        "ffn_swigl": ("ffn_silu", "ffn_up"),
        "ffn_out": ("ffn_swigl",),
        "post_ffn_residual": ("post_attn_residual", "ffn_out"),
        "final_norm": (RESIDUAL,),
        "lm_head": ("final_norm",),
    }
    assert {stage.name: "".join(stage.axes) for stage in ALL} == {
        "embedding": "TD",
        "attn_norm": "TD",
        "qkv_matmul": "TF",
        "qkv_bias": "TF",
        "q_post_rope": "TNH",
        "k_post_rope": "TKH",
        "attn_scores": "NTS",
        "attn_softmax": "NTS",
        "attention": "TE",
        "attn_out": "TD",
        "post_attn_residual": "TD",
        "ffn_norm": "TD",
        "ffn_gate": "TI",
        "ffn_up": "TI",
        "ffn_silu": "TI",
        "ffn_swigl": "TI",
        "ffn_out": "TD",
        "post_ffn_residual": "TD",
        "final_norm": "TD",
        "lm_head": "TV",
    }
    assert [stage.name for stage in ALL if stage.masked] == ["attn_scores", "attn_softmax"]
    assert {stage.name: stage.blocks for stage in ALL if stage.blocks} == {
        "qkv_matmul": ("q", "k", "v"),
        "qkv_bias": ("q", "k", "v"),
    }


# --- what needs what ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEVENTEEN)
def test_a_stage_needs_exactly_what_the_formulas_say(name: str) -> None:
    needed = [stage.name for stage in needed_for(named([name]))]
    assert needed == [other for other in SEVENTEEN if other in NEEDS[name] | {name}]


@given(SUBSETS)
def test_some_stages_need_what_each_of_them_needs(names: list[str]) -> None:
    union = set(names).union(*(NEEDS[name] for name in names))
    assert [stage.name for stage in needed_for(named(names))] == [
        n for n in SEVENTEEN if n in union
    ]
    assert needed_for(named(names)[::-1]) == needed_for(named(names))


def test_the_embedding_needs_nothing_of_attention() -> None:
    assert needed_for([EMBEDDING]) == ()
    assert needed_for([]) == ()
    assert needed_for([EMBEDDING, ATTENTION[0]]) == ATTENTION[:1]


# --- --stages -------------------------------------------------------------------------------------


def test_groups() -> None:
    assert parse_stages("attention") == ATTENTION
    assert parse_stages(" mlp ") == tuple(named(MLP_SIX))
    residual = ("embedding", "post_attn_residual", "post_ffn_residual")
    assert parse_stages("residual") == tuple(named(residual))
    assert parse_stages("all") is None  # those that the layers have: only a capture knows
    assert parse_stages("lm_head,mlp") == tuple(named([*MLP_SIX, "lm_head"]))
    assert parse_stages("all,embedding") == ALL


def test_in_a_list_attention_is_the_stage() -> None:
    assert parse_stages("attention,attn_out") == tuple(named(["attention", "attn_out"]))
    assert parse_stages("attention,attention") == tuple(named(["attention"]))


@given(st.lists(st.sampled_from(TWENTY), min_size=1), st.sampled_from([",", " , "]))
def test_named_stages_come_once_and_in_chain_order(names: list[str], comma: str) -> None:
    assert parse_stages(comma.join([*names, names[0]])) == tuple(named(names))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("attn_score", "attn_scores"),
        ("attn_scroes", "attn_scores"),
        ("softmax", "attn_softmax"),
        ("Attention", "attention"),
        ("q_rope", "q_post_rope"),
        ("k-post-rope", "k_post_rope"),
        ("norm", "ffn_norm"),
        ("final-norm", "final_norm"),
        ("lmhead", "lm_head"),
        ("ffn_swiglu", "ffn_swigl"),
        ("qkv", "qkv_bias"),
        ("embeddings", "embedding"),
        ("embed", "embedding"),
    ],
)
def test_an_unknown_stage_is_answered_with_the_nearest(wrong: str, right: str) -> None:
    for spec in (wrong, f"attn_norm,{wrong}", f"{wrong},attn_norm"):
        with pytest.raises(QwenrefError) as error:
            parse_stages(spec)
        assert repr(wrong) in str(error.value)
        assert f"did you mean {right!r}?" in str(error.value)


@pytest.mark.parametrize(
    "spec", ["", ",", "attn_norm,", ",attn_norm", "attn_norm attn_out", "attn_norm;attn_out", "*"]
)
def test_what_names_no_stage_is_refused_with_the_list(spec: str) -> None:
    with pytest.raises(QwenrefError) as error:
        parse_stages(spec)
    for name in TWENTY:
        assert name in str(error.value)


@given(st.text(max_size=20))
def test_any_text_names_stages_or_is_refused(spec: str) -> None:
    found, message = (), ""
    try:
        found = parse_stages(spec) or ALL
    except QwenrefError as error:
        message = str(error)
    assert bool(found) != bool(message)


# --- --layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("0", (0,)),
        ("7", (7,)),
        ("0,1", (0, 1)),
        ("1,0", (0, 1)),
        ("0..4", (0, 1, 2, 3)),
        ("3..4", (3,)),
        ("0..1", (0,)),
        ("2,0..2,2", (0, 1, 2)),
        ("0..3,1..4", (0, 1, 2, 3)),
        ("5, 3 ,4", (3, 4, 5)),
        ("007", (7,)),
        (f"{MAX_LAYERS - 1}", (MAX_LAYERS - 1,)),
        (f"0..{MAX_LAYERS}", tuple(range(MAX_LAYERS))),
    ],
)
def test_layers_come_once_in_order_without_the_end_of_a_range(
    spec: str, layers: tuple[int, ...]
) -> None:
    assert parse_layers(spec) == layers


@pytest.mark.parametrize(
    "spec",
    [
        *("", " ", ",", "0,", ",0", "-1", "+1", "1.5", "0...4", "0..", "..4", "..", "0-4", "0:4"),
        *("0 .. 4", "0 1", "0;1", "a", "All", "0x1", "1_0", "1e3", "0..4..8", "0..-1"),
        *("\u0661", "\u00b2", "0\0", "0\n\n1", "4..4", "4..0", "0..0"),
        *("9" * 9, "9" * 10, "9" * 5000, "0.." + "9" * 5000, f"{MAX_LAYERS}"),
        *(f"0..{MAX_LAYERS + 1}", "0..999999999", "999999998..999999999"),
    ],
)
def test_what_names_no_layers_is_refused_by_the_name_of_the_option(spec: str) -> None:
    with pytest.raises(QwenrefError, match="--layers"):
        parse_layers(spec)


def test_all_layers_are_as_many_as_the_checkpoint_has() -> None:
    assert parse_layers("all") is None
    assert parse_layers(" all ") is None


def test_hostile_ranges_are_bounded() -> None:
    for spec in ("0..999999999", ",".join(["0..16384"] * 200), "0," * 50_000 + "0"):
        try:
            layers = parse_layers(spec) or ()
        except QwenrefError:
            layers = ()
        assert len(layers) <= MAX_LAYERS


@given(st.sets(st.integers(0, 200), min_size=1), st.randoms())
def test_layers_written_out_in_any_order_are_read_back(
    layers: set[int], rng: random.Random
) -> None:
    shuffled = list(layers)
    rng.shuffle(shuffled)
    assert parse_layers(",".join(map(str, shuffled))) == tuple(sorted(layers))


# --- SUB-005 --------------------------------------------------------------------------------------


def captured(cli: Cli, names: tuple[str, ...], *options: object) -> dict[str, bytes]:
    """Capture these stages of the bundled checkpoint, and return what the files hold."""
    folder = Path("dump")
    spec = ",".join([*names, names[0]])  # "attention" alone would be the group
    done = cli("capture", "--stages", spec, "-o", folder, "--force", "-q", *options)
    assert (done.status, done.err) == (0, "")
    return {path.stem: path.read_bytes() for path in folder.glob("layer-0/*")}


RANDOM_SUBSETS = [
    tuple(random.Random(seed).sample(TWENTY[:-2], size))
    for seed, size in enumerate((2, 2, 3, 3, 4, 5, 6, 8))
]


@pytest.mark.parametrize("piece_bytes", [None, 2000], ids=["one piece", "several pieces"])
def test_sub_005_fewer_stages_never_change_the_values_of_the_others(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, piece_bytes: int | None
) -> None:
    from qwenref import chain

    if piece_bytes:
        monkeypatch.setattr(chain, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(chain, "LEAST_TOKENS", 1)
        monkeypatch.setattr(chain, "LEAST_QUERIES", 1)
    everything = captured(cli, TWENTY[:-2])
    assert set(everything) == {*TWENTY[:-2]}
    assert len(set(everything.values())) == 18
    for names in [*((name,) for name in TWENTY[:-2]), *RANDOM_SUBSETS]:
        assert captured(cli, names) == {name: everything[name] for name in names}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_sub_005_holds_in_every_dtype_and_in_the_other_layout(dtype: str, cli: Cli) -> None:
    options = ("--dtype", dtype, "--layout", "hf", "--tokens", "87,104,97")
    everything = captured(cli, NINE, *options)
    for names in itertools.combinations(NINE[3:], 2):
        assert captured(cli, names, *options) == {name: everything[name] for name in names}


def test_the_files_of_a_dump_are_listed_in_chain_order(cli: Cli) -> None:
    wanted = ("attn_out", "k_post_rope", "embedding", "attn_norm")
    done = cli("capture", "--stages", ",".join(wanted), "--model", TINY, "--json")
    assert [stage["stage"] for stage in json.loads(done.out)["stages"]] == [
        "embedding",
        "attn_norm",
        "k_post_rope",
        "attn_out",
    ]
