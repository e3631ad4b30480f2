"""What may be asked for: every limit as it is said, and a sentence for whatever is not JSON of ours."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from typing import Any

import pytest

from lcm_kit.cli import serve as cli_serve
from lcm_kit.errors import UserError
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.asked import EXAMPLES, Wanted, parsed, settled
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.run import Kept

LIMITS = Limits(side=96, steps=10, count=3, prompt=20)


def settle(what: Served, **asked: Any) -> Any:
    return settled(parsed(json.dumps({"prompt": "a", **asked}).encode(), Wanted), what, LIMITS)


def test_what_nobody_says_is_what_serves_the_lora(tiny: Served) -> None:
    assert settle(tiny).settings == {
        "prompt": "a", "negative_prompt": None, "seed": 0, "count": 1, "sampler": "lcm", "steps": 4,
        "guidance_scale": 1.0, "width": 64, "height": 64, "adapters": {"tiny-lcm-lora": 1.0},
    }  # fmt: skip


def test_the_settings_of_an_answer_are_a_request_for_the_same(tiny: Served) -> None:
    for example in EXAMPLES.values():
        first = settle(tiny, **example)
        assert settle(tiny, **first.settings) == first


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"count": 4}, "count 4 is more than this server draws; give 1 to 3"),
        ({"steps": 11}, "steps 11 is more than this server draws; give 1 to 10"),
        ({"width": 104}, "width 104 is more than this server draws; give at most 96"),
        ({"width": 64, "height": 104}, "height 104 is more than this server draws"),
        ({"height": 68, "width": 64}, "height 68 is no multiple of 8 pixels; try 64"),
        ({"prompt": "b" * 21}, "prompt has 21 characters; this server takes 20"),
        ({"prompt": "a\x00b"}, r"prompt holds a control character, '\\x00'; write it without"),
        ({"prompt": "a\x1b[2Jb"}, r"prompt holds a control character, '\\x1b'"),
        ({"negative_prompt": "\x07", "guidance_scale": 2}, r"negative_prompt holds a control character"),
        ({"negative_prompt": "b"}, "does nothing at guidance_scale 1, which tiny-lcm-lora"),
        ({"negative_prompt": "b", "adapters": {}}, "does nothing at guidance_scale 1; give"),
        ({"adapters": {"tiny-lcm-lor": 1}}, "has no 'tiny-lcm-lor'; choose of tiny-lcm-lora; did"),
        ({"sampler": "euler"}, "sampler 'euler' is unknown; choose one of lcm"),
        ({"sampler": "e" * 60_000}, "sampler: 'e.*; it must have at most 40 characters"),
        ({"sampler": "lcm:399", "steps": 2}, "steps 2 is impossible with sampler lcm:399; give 1 to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_a_sentence(tiny: Served, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        settle(tiny, **asked)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the request is not JSON"), (b"{", "the request is not JSON"), (b"\xff\xfe{", "is not JSON"),
        (b"[]", "the request is no JSON object"), (b"null", "no JSON object"),
        (b'"prompt"', "no JSON object"),
        (b"[" * 100_000, "the request is not JSON"), (b'{"prompt":' * 50_000, "the request is not JSON"),
        (b"{}", "prompt: missing; it must be given"),
        (b'{"prompt": "\\ud800"}', "the request is not JSON"),
        (b'{"prompt": 5}', "prompt: 5 is not allowed; it must be a valid string"),
        (b'{"prompt": null}', "prompt: null is not allowed"),
        (b'{"prompt": "a", "promt": 1}', "promt: unknown key; did you mean `prompt`"),
        (b'{"prompt": "a", "seed": 1.5}', "seed: 1.5 is not allowed; it must be a valid integer"),
        (b'{"prompt": "a", "seed": true}', "seed: true is not allowed"),
        (b'{"prompt": "a", "seed": "7"}', "seed: '7' is not allowed"),
        (b'{"prompt": "a", "seed": 9223372036854775808}', "seed: 9223372036854775808 is not allowed"),
        (b'{"prompt": "a", "count": 0}', "count: 0 is not allowed; it must be greater than or equal to 1"),
        (b'{"prompt": "a", "count": 1e999}', "count: inf is not allowed"),
        (b'{"prompt": "a", "count": NaN}', "count: nan is not allowed"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "guidance_scale: nan is not allowed"),
        (b'{"prompt": "a", "guidance_scale": Infinity}', "guidance_scale: inf is not allowed"),
        (b'{"prompt": "a", "guidance_scale": 0.5}', "guidance_scale: 0.5 is not allowed"),
        (b'{"prompt": "a", "guidance_scale": 1e300}', "guidance_scale: 1e"),
        (b'{"prompt": "a", "adapters": {"b": NaN}}', r"adapters\.b: nan is not allowed"),
        (b'{"prompt": "a", "adapters": {"b": -1e9}}', r"adapters\.b: -1000000000.0 is not allowed"),
        (b'{"prompt": "a", "adapters": ["b"]}', "adapters: "),
        (b'{"prompt": "a", "steps": ' + b"9" * 4000 + b"}", "steps: 9999"),
        (b'{"prompt": "a", "steps": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"prompt": "a", "prompt": "b"}', "^prompt: given 2 times; give it once$"),
        (b'{"prompt": "a", "seed": 1, "\\u0073eed": 1, "seed": 2}', "^seed: given 3 times"),
        (b'{"prompt": "a", "adapters": {"b": 1, "b": 0}}', "^b: given 2 times"),
        (b'{"prompt": "a", "height": 1000000000000000000}', "height: 1000000000000000000 is not allowed"),
    ],
)  # fmt: skip
def test_a_body_that_is_none_of_ours_is_a_sentence(body: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        parsed(body, Wanted)
    assert len(str(refused.value)) < 400


def test_all_that_is_wrong_is_said_at_once_and_not_without_end() -> None:
    with pytest.raises(UserError, match="2 things are wrong") as refused:
        parsed(b'{"prompt": 1, "seed": "x"}', Wanted)
    assert len(refused.value.args[1]) == 2
    many = {f"key{k}": k for k in range(1000)}
    with pytest.raises(UserError) as refused:
        parsed(json.dumps(many).encode(), Wanted)
    assert len(refused.value.args[1]) == 10
    said = "^1001 things are wrong with this request, of which these are the first 10\n"  # and no prompt
    with pytest.raises(UserError, match=said):
        parsed(json.dumps(many).encode(), Wanted)


def test_the_options_of_the_verb_are_the_limits() -> None:
    """They stand in two places, for the command line begins without anything of a server."""
    options = inspect.signature(cli_serve.serve).parameters
    for limit in fields(Limits):
        option = options.get(limit.name) or options[f"max_{limit.name}"]
        assert option.default == limit.default, limit.name
    assert (options["data"].default, options["history"].default) == (Kept().folder, Kept().pictures)
