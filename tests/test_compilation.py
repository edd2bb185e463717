"""How programs are compiled for a CPU."""

import jax
import jax.numpy as jnp
import pytest

from rlx.compilation import CPU_OPTIONS, compile_program


def lowered():
    return jax.jit(lambda x, y: jnp.tanh(x @ y)).lower(jnp.ones((256, 128)), jnp.ones((128, 128)))


def test_matrix_products_are_xlas_own_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    plain = lowered().compile().as_text()
    if "ynn" not in plain:
        pytest.skip("this XLA does not hand them to YNNPACK")
    assert "ynn" not in compile_program(lowered()).as_text()
    monkeypatch.setenv("XLA_FLAGS", f"--{next(iter(CPU_OPTIONS))}=LIBRARY_FUSION_TYPE_DOT")
    assert "ynn" in compile_program(lowered()).as_text()


def test_an_option_that_xla_does_not_know_is_left_out_and_a_wrong_value_is_not(monkeypatch):
    monkeypatch.setattr("rlx.compilation.CPU_OPTIONS", {"xla_cpu_of_another_version": "1"})
    assert float(compile_program(lowered())(jnp.ones((256, 128)), jnp.zeros((128, 128))).sum()) == 0.0
    monkeypatch.setattr("rlx.compilation.CPU_OPTIONS", {"xla_cpu_multi_thread_eigen": "perhaps"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="perhaps"):
        compile_program(lowered())
