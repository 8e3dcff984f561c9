"""Chat templates: what transformers makes of messages, in words for what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Engine
from transformers import PreTrainedTokenizerFast

import gptlab
from gptlab.text.chat import render_chat
from gptlab.text.tokenizers import Tokenizer, read_tokenizer, train_bpe

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "indented": (
        "{{ bos_token }}\n{%- for message in messages %}\n    {%- if message.role == 'system' %}\n"
        "        {%- continue %}\n    {%- endif %}\n    [{{ message.role | tojson }}] {{ message.content | tojson }}\n"
        "    {% set ns = namespace(n=loop.index) %}\n {{ ns.n }}{{ eos_token }}\n{% endfor %}\n"
    ),
}
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Why?\n é 'q'"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "And <|im_end|>?"},
]


@pytest.fixture
def tokenizer() -> Tokenizer:
    from tokenizers import AddedToken

    engine = Engine.from_str(train_bpe(["why is the sky blue " * 9], 280).files()["tokenizer.json"].decode())
    engine.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    from gptlab.text.tokenizers import FileTokenizer

    tokenizer = FileTokenizer(engine)
    ids = tokenizer.special_tokens
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    tokenizer.set_borders(end_of_text=ends[0], start=ids["<|im_start|>"], ends=ends)
    return tokenizer


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_reads_as_in_transformers(tokenizer: Tokenizer, name: str, n: int) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    judge = PreTrainedTokenizerFast(
        tokenizer_object=Engine.from_str(tokenizer.files()["tokenizer.json"].decode()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATES[name],
    )
    messages = MESSAGES[-n:]
    expected = judge.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert render_chat(tokenizer, messages) == expected
    if name == "chatml":  # transformers looks for the last message as it is written, which tojson changes
        expected = judge.apply_chat_template(messages, continue_final_message=True, tokenize=False)
        assert render_chat(tokenizer, messages, answer=False) == expected
    lm = gptlab.LanguageModel(gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=300)), tokenizer)
    ids = judge.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert lm.chat_ids(messages) == ids
    if n == 1:
        assert lm.chat_ids(MESSAGES[-1]["content"]) == ids


@pytest.mark.parametrize("kind", ["gptlab", "hf", "jinja", "several"])
def test_a_template_is_kept(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    import json

    from gptlab.checkpoints import Checkpoint, huggingface

    tokenizer.chat_template = TEMPLATES["chatml"]
    config = gptlab.ModelConfig.preset("tiny", vocab_size=tokenizer.vocab_size)
    lm = gptlab.LanguageModel(gptlab.GPT(config), tokenizer)
    if kind == "hf":
        huggingface.write(tmp_path, Checkpoint(config, lm.model.tensors(), tokenizer))
    else:
        gptlab.save(lm, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    about = json.loads(path.read_text())
    if kind == "jinja":
        (tmp_path / "chat_template.jinja").write_text(about.pop("chat_template"))
    elif kind == "several":
        named = [{"name": "tools", "template": "no"}, {"name": "default", "template": about["chat_template"]}]
        about["chat_template"] = named
    path.write_text(json.dumps(about))
    read = read_tokenizer(tmp_path)
    assert read is not None
    assert read.chat_template == TEMPLATES["chatml"]
    assert (read.ends, read.start_of_text) == (tokenizer.ends, tokenizer.start_of_text)
    assert gptlab.load(tmp_path).chat_ids("hi") == lm.chat_ids("hi")


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "has no chat template"),
        ("{% for", "cannot be used ("),
        ("{{ messages[0].content + 1 }}", "cannot be used ("),
        ("{{ raise_exception('roles must take turns') }}", "refuses these messages: roles must take turns"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be used ("),
        ("{{ messages.append(1) }}", "cannot be used ("),
        ("{% for i in range(1000000000) %}x{% endfor %}", "cannot be used ("),
    ],
)
def test_templates_that_do_not_work(tokenizer: Tokenizer, template: str | None, complaint: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(gptlab.GptlabError) as caught:
        render_chat(tokenizer, MESSAGES)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
