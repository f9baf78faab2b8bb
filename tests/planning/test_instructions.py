"""What is read off a program for each instruction: its place, its FLOPs and its bytes."""

import jax
import jax.numpy as jnp
import pytest

from lm.errors import InputError
from lm.planning import instructions
from lm.planning.instructions import parse

PROGRAM = """HloModule jit_train_step, is_scheduled=true

FileNames
1 "step.py"

%products (a: f32[8,4], b: bf16[2,4,6]) -> f32[8,6] {
  %a = f32[8,4]{1,0} parameter(0), metadata={op_name="state.weights"}
  %b = bf16[2,4,6]{2,1,0} parameter(1)
  %part = bf16[1,4,6]{2,1,0} dynamic-slice(%b, %zero), dynamic_slice_sizes={1,4,6}
  %matrix = bf16[4,6]{1,0} bitcast(%part)
  %small = f32[8,1]{1,0} dot(%a, %a), lhs_contracting_dims={1}, metadata={op_name="jit(f)/small"}
  ROOT %dot.1 = f32[8,6]{1,0} dot(%a, %matrix), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, metadata={op_name="jit(f)/mlp/dot_general" stack_frame_id=1}
}

%elementwise (c: f32[3,5]) -> (f32[3,5], f32[9,5]) {
  %c = f32[3,5]{1,0:T(8,128)} parameter(0)
  %d = f32[9,5]{1,0} parameter(1)
  %x = f32[3,5]{1,0} multiply(%c, %c), metadata={op_name="jit(f)/optimizer/mul"}
  %y = f32[3,5]{1,0} add(%x, %c), metadata={op_name="jit(f)/optimizer/add"}
  %z = f32[3,5]{1,0} select(%x, %y), metadata={op_name="jit(f)/jit(_where)/select_n"}
  %in-place = f32[9,5]{1,0} dynamic-update-slice(%d, %z, %zero, %zero)
  ROOT %both = (f32[3,5]{1,0}, /*index=1*/f32[9,5]{1,0}) tuple(%z, %in-place)
}

%body (p: (f32[8,4])) -> (f32[8,4]) {
  %p = (f32[8,4]{1,0}) parameter(0)
  %inside = f32[8,4]{1,0} negate(%p), metadata={op_name="jit(f)/while/body/neg"}
}

ENTRY %main (w: f32[8,4]) -> f32[8,6] {
  %w = f32[8,4]{1,0} parameter(0)
  %u = bf16[2,4,6]{2,1,0} parameter(1)
  %batched = f32[3,7,2]{2,1,0} dot(%left, %right), lhs_batch_dims={0}, \
lhs_contracting_dims={1,3}, metadata={op_name="jit(f)/\\"attend\\"/dot_general"}
  %left = f32[3,5,7,11]{3,2,1,0} parameter(2)
  %right = f32[3,5,11,2]{3,2,1,0} parameter(3)
  %loop = (f32[8,4]{1,0}) while(%w), condition=%body, body=%body
  %fused.1 = (f32[3,5]{1,0}, /*index=1*/f32[9,5]{1,0}) fusion(%w, %u), kind=kLoop, \
calls=%elementwise, metadata={op_name="jit(f)/jit(_where)/select_n"}
  %copy.3 = pred[16]{0} copy(%flags)
  %flags = pred[16]{0} parameter(4)
  ROOT %fused.2 = f32[8,6]{1,0} fusion(%w, %u), kind=kCustom, calls=%products
}
"""


def test_flops_are_those_of_the_dots():
    found = parse(PROGRAM)
    assert found["dot.1"].flops == 2 * 8 * 6 * 4
    assert found["fused.2"].flops == 2 * 8 * 6 * 4 + 2 * 8 * 1 * 4
    assert found["batched"].flops == 2 * (3 * 7 * 2) * (5 * 11)
    assert found["fused.1"].flops == found["copy.3"].flops == 0


def test_bytes_are_what_is_used_of_the_operands_and_what_is_written():
    found = parse(PROGRAM)
    # Of a stack of two matrices the one that is sliced.
    assert found["fused.2"].bytes == 4 * 8 * 4 + 2 * 4 * 6 + 4 * 8 * 6
    # The larger array is updated in place: neither read nor written but for the update.
    assert found["fused.1"].bytes == 4 * (3 * 5) * 3
    assert found["batched"].bytes == 4 * (3 * 5 * 7 * 11 + 3 * 5 * 11 * 2 + 3 * 7 * 2)
    assert found["copy.3"].bytes == 2 * 16


def test_a_place_is_that_of_the_largest_dot_or_of_most_of_a_fusion():
    found = parse(PROGRAM)
    assert found["fused.2"].place == "jit(f)/mlp/dot_general"
    assert found["fused.1"].place == "jit(f)/optimizer/mul"
    assert found["batched"].place == r"jit(f)/\"attend\"/dot_general"
    assert found["copy.3"].place == ""
    one = PROGRAM.replace("jit(f)/optimizer/add", "jit(f)/jit(_where)/add")
    assert parse(one)["fused.1"].place == "jit(f)/jit(_where)/select_n"


def test_what_starts_others_does_nothing_itself():
    found = parse(PROGRAM)
    assert found["loop"][2:] == (0, 0)
    assert found["inside"].place == "jit(f)/while/body/neg"


def test_the_products_of_a_compiled_program_are_all_found():
    """A small network and its gradients, with the FLOPs counted by hand."""
    rows, inner, outer, heads = 48, 40, 24, 3

    def loss(a_HIO, b_HOI, x_HRI):
        hidden_HRO = jnp.tanh(jnp.einsum("hri,hio->hro", x_HRI, a_HIO))
        return jnp.sin(jnp.einsum("hro,hoi->hri", hidden_HRO, b_HOI)).sum()

    shapes = (heads, inner, outer), (heads, outer, inner), (heads, rows, inner)
    arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile().as_text()
    found = parse(text)
    # Both products; of the gradients two for b and one for a, as x has none.
    expected = 5 * 2 * heads * rows * inner * outer
    dots = [one for one in found.values() if one.opcode == "dot"]
    assert sum(one.flops for one in dots) == expected
    assert all("hri,hio->hro" in one.place or "hro,hoi->hri" in one.place for one in dots)


def chain(length):
    """Computations of which each calls the next one."""
    parts = ["HloModule x\n"]
    for i in range(length):
        parts.append(
            f"%c{i} (p: f32[]) -> f32[] {{\n  %a{i} = f32[] map(%p), to_apply=%c{i + 1}\n}}"
        )
    parts.append(f"%c{length} (p: f32[]) -> f32[] {{\n  %z = f32[] negate(%p)\n}}")
    return "\n".join([*parts, "ENTRY %m (p: f32[]) -> f32[] {\n  %y = f32[] copy(%p)\n}\n"])


BAD = {
    "empty": (b"", "no HloModule"),
    "not text": (b"\xff\xfe", "cannot be read"),
    "JSON": (b'{"a": 1}', "no HloModule"),
    "cut off": (PROGRAM[:-20].encode(), "no end"),
    "no entry": (PROGRAM.replace("ENTRY ", "").encode(), "no ENTRY"),
    "no computation": (PROGRAM.replace("calls=%products", "calls=%gone").encode(), "calls gone"),
    "no operand": (PROGRAM.replace("dot(%a, %matrix)", "dot(%b1)").encode(), "dot dot.1 are not"),
    "axis": (PROGRAM.replace("dims={1,3}", "dims={1,4}").encode(), "batched sums over axes"),
    "tuple": (
        PROGRAM.replace("%a = f32[8,4]{1,0}", "%a = (f32[8], u8[2])").encode(),
        "not of arrays",
    ),
    "digits": (PROGRAM.replace("f32[3,7,2]", f"f32[{'9' * 5000}]").encode(), "integer"),
    "huge": (PROGRAM.replace("f32[3,7,2]", f"f32[{'9' * 400}]").encode(), "beyond any machine"),
    "itself": (PROGRAM.replace("negate(%p)", "map(%p), to_apply=%body").encode(), "too deep"),
    "deep": (chain(5000).encode(), "too deep"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_program_is_refused_in_one_line(name, tmp_path):
    content, expected = BAD[name]
    file = tmp_path / "step.hlo.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=expected) as raised:
        instructions.read(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_shared_is_followed_once():
    """Forty computations of which each calls the next one twice have 2^40 ways through them."""
    call = "  %{0} = f32[2] fusion(%p), calls=%c{1}\n"
    parts = ["HloModule x\n"]
    for i in range(40):
        parts.append(f"%c{i} (p: f32[2]) -> f32[2] {{")
        parts.append(call.format(f"a{i}", i + 1) + call.format(f"b{i}", i + 1) + "}")
    dot = "  ROOT %d = f32[] dot(%p, %p), lhs_contracting_dims={0}\n  %p = f32[2] parameter(0)\n"
    parts += [f"%c40 (p: f32[2]) -> f32[] {{\n{dot}}}", "ENTRY %m (p: f32[2]) -> f32[] {"]
    found = parse("\n".join([*parts, call.format("top", 0) + "}\n"]))
    assert found["top"].flops == 2**40 * 4


def test_a_program_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    file = tmp_path / "step.hlo.txt"
    file.write_text(PROGRAM)
    assert instructions.read(file) == parse(PROGRAM)
    monkeypatch.setattr(instructions, "_MOST_BYTES", len(PROGRAM) - 1)
    with pytest.raises(InputError, match="too long a program"):
        instructions.read(file)
    with pytest.raises(InputError, match="cannot be read"):
        instructions.read(tmp_path / "gone")


def test_a_program_has_a_name_without_letters_that_lead_elsewhere():
    found = instructions.path("trace", "variant ../4 bits, int8")
    assert str(found) == "trace/programs/variant_4_bits_int8.hlo.txt"
