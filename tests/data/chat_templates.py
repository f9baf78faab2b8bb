"""Chat templates in the styles of published models, and what each writes, without Jinja."""

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
# Without a text that opens an answer, and with the block that marks answers.
HEADER = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' ~ message.role ~ '\n' }}\n"
    "    {%- generation %}\n"
    "    {{- message.content ~ '<|im_end|>\n' }}\n"
    "    {%- endgeneration %}\n"
    "{%- endfor %}"
)
# Qwen 3 writes an empty thought in the last answer, and none in those before.
THINKING = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def chatml(messages):
    return [
        part
        for role, content in messages
        for part in (
            (f"<|im_start|>{role}\n", 0),
            (f"{content}<|im_end|>", int(role == "assistant")),
            ("\n", 0),
        )
    ]


def smollm(messages):
    default = [] if messages[0][0] == "system" else [("system", "Be kind.")]
    return chatml([*default, *messages])


def llama(messages):
    parts = [("<s>", 0)]
    for role, content in messages:
        parts += [(f"<|start_header_id|>{role}<|end_header_id|>\n\n", 0)]
        parts += [(f"{content.strip()}<|eot_id|>", int(role == "assistant"))]
    return parts


def gemma(messages):
    parts = [("<s>", 0)]
    for role, content in messages:
        name = "model" if role == "assistant" else role
        parts += [(f"<start_of_turn>{name}\n", 0)]
        parts += [(f"{content.strip()}<end_of_turn>", int(role == "assistant")), ("\n", 0)]
    return parts


def mistral(messages):
    parts = [("<s>", 0)]
    for role, content in messages:
        if role == "assistant":
            parts += [(f" {content}</s>", 1)]
        else:
            parts += [(f"[INST] {content} [/INST]", 0)]
    return parts


def thinking(messages):
    parts = chatml(messages)
    last = messages[-1]
    if last[0] == "assistant":
        parts[-2] = (f"<think>\n\n</think>\n\n{last[1]}<|im_end|>", 1)
    return parts


# Name -> the source and what it writes: pairs of a text and whether it is trained on.
STYLES = {
    "chatml": (None, chatml),
    "smollm": (SMOLLM, smollm),
    "llama": (LLAMA, llama),
    "gemma": (GEMMA, gemma),
    "mistral": (MISTRAL, mistral),
    "header": (HEADER, chatml),
    "thinking": (THINKING, thinking),
}
SPECIAL = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
