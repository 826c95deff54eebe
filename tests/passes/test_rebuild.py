"""Rebuilding a function binding by binding."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.graph import op_name
from kvc_passes.rebuild import drop_params, insert_params, rebuild, substitute
from support import floats, module_of, ops, param, params_of, run, symbol

X, Y = param("x", [symbol("n"), 4]), param("y", [4])


def _body(emit: Any, *_: Any) -> Any:
    both = emit(op.concat([emit(op.exp(X)), emit(op.negative(X))], axis=1))
    emit(op.sin(X))
    return emit(op.concat([both, both], axis=1))


def test_without_a_rule_only_dead_code_goes() -> None:
    module, _ = module_of([X, Y], _body)
    result = rebuild(module, module["main"].params, lambda *_: None)
    assert ops(result) == {"concat": 2, "exp": 1, "negative": 1}
    x, y = floats(3, 4), floats(4)
    np.testing.assert_array_equal(run(result, x, y)[0], run(module, x, y)[0])
    tvm.ir.assert_structural_equal(rebuild(result, result["main"].params, lambda *_: None), result)


def test_a_rule_replaces_a_binding_and_its_uses_follow() -> None:
    module, _ = module_of([X, Y], _body)
    seen: list[str] = []

    def rule(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        seen.append(op_name(value))
        return op.add(builder.emit(op.abs(value.args[0])), Y) if op_name(value) == "exp" else None

    result = rebuild(module, module["main"].params, rule)
    assert [name for name in seen if name] == ["exp", "negative", "concat", "sin", "concat"]
    x, y = floats(3, 4), floats(4)
    once = np.concatenate([np.abs(x) + y, -x], axis=1)
    np.testing.assert_array_equal(run(result, x, y)[0], np.concatenate([once, once], axis=1))


def test_the_given_module_stays_as_it_was() -> None:
    module, _ = module_of([X, Y], _body)
    before = module.script()
    rebuild(module, module["main"].params, lambda b, v, value: op.abs(X) if op_name(value) == "exp" else None)
    assert module.script() == before


def test_other_functions_stay() -> None:
    module, _ = module_of([X, Y], _body)
    builder = relax.BlockBuilder(module)
    helper = relax.Function([Y], relax.SeqExpr([], Y), Y.ty).with_attr("global_symbol", "helper")
    builder.add_func(helper, "helper")
    result = rebuild(builder.get(), module["main"].params, lambda *_: None)
    assert "helper" in {v.name_hint for v, _ in result.functions_items()}


def test_parameters_are_inserted_and_dropped() -> None:
    module, _ = module_of([X, Y], _body)
    z = param("z", [4])
    assert [p.name for p in insert_params(module["main"], "x", [z])] == ["x", "z", "y"]
    result = rebuild(module, insert_params(module["main"], "x", [z]), lambda *_: None)
    assert params_of(result) == ["x", "z", "y"]
    assert params_of(drop_params(result, {"z", None})) == ["x", "y"]


def test_another_parameter_or_output_can_take_a_values_place() -> None:
    module, _ = module_of([X], lambda emit, x: [emit(op.exp(x)), emit(op.negative(x))])
    wide = param("wide", [symbol("m"), 2, 4])
    flat = op.reshape(wide, [wide.ty.shape.values[0] * 2, 4])
    pair = module["main"].body.blocks[0].bindings[1].var
    result = rebuild(module, [wide], lambda *_: None, values={module["main"].params[0]: flat}, output=pair)
    assert isinstance(result, IRModule)
    x = floats(3, 2, 4)
    np.testing.assert_array_equal(run(result, x)[0], -x.reshape(6, 4))


def test_operands_are_replaced_in_tuples_and_calls() -> None:
    a, b = param("a", [4]), param("b", [4])
    value = substitute(relax.Tuple([a, relax.Tuple([a, b])]), {a: b})
    assert value.fields[0].same_as(b)
    assert value.fields[1].fields[0].same_as(b)
    assert substitute(op.add(a, b), {a: b}).args[0].same_as(b)
