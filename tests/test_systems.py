"""The tables by which a network is chosen: their keys are equal, and another objective is one row."""

import jax
import pytest

from skysense_jax import recipes
from skysense_jax.commands import import_torch
from skysense_jax.convert import keymap, layouts
from skysense_jax.core import mesh as meshes
from skysense_jax.core import trees
from skysense_jax.data.batches import spec, views
from skysense_jax.models import skysense, systems
from skysense_jax.run import plan as plans
from tests.helpers import toy_objective


def test_every_network_has_a_torch_layout_an_importer_and_a_pretraining():
    for table in (layouts.LAYOUTS, import_torch.IMPORTERS):
        assert table.keys() == systems.SYSTEMS.keys()
    assert {recipe.system for recipe in recipes.RECIPES.values()} == set(systems.SYSTEMS)
    for name in systems.SYSTEMS:
        assert recipes.RECIPES[name].system == name, "without config.recipe a network is trained by the row of its name"


def test_every_module_of_skysense_has_its_prefix_in_a_whole_file():
    """keymap.PREFIXES against the modules of a network that has all of them; the calendar's table alone has none."""
    cfg = toy_objective.config("unused").model
    with cfg.unlocked():
        cfg.geo_context = {"bank": "on", "regions": 4, "prototypes": 2, "width": 8, "cell": 1e6, "table": "hashed"}
    contract = {"sensors": dict.fromkeys(("hr", "s2", "s1"))}
    assert set(skysense.module_names(cfg, contract)) == set(keymap.PREFIXES)
    assert len(set(keymap.PREFIXES.values())) == len(keymap.PREFIXES)


def test_a_new_objective_on_an_existing_network_is_one_row(monkeypatch):
    cfg = toy_objective.config("unused")
    with pytest.raises(ValueError, match=r"config.recipe='toy' has no training objective; there are skysense, msgfm"):
        recipes.check_config(cfg)

    row = recipes.Recipe(
        system="skysense",
        make_objective=toy_objective.make_objective,
        batches=views,
        batch_spec=spec.views_spec,
        fields=recipes.RECIPES["skysense"].fields,
    )
    monkeypatch.setitem(recipes.RECIPES, "toy", row)
    recipes.check_config(cfg)
    contract, mesh = plans.make_contract(cfg), meshes.make_mesh(cfg.mesh.to_dict())
    plan = plans.make_plan(cfg, contract, mesh)
    assert systems.system_of(cfg.model) is systems.SYSTEMS["skysense"]
    assert set(trees.flatten(plan.state.params)) == {"encoder/layer/kernel", "encoder/layer/bias"}
    jitted = plans.jit_step(plan, mesh)
    state, metrics = jax.eval_shape(jitted, plan.state, plan.batch)
    assert jax.tree.structure(state) == jax.tree.structure(plan.state)
    assert "loss/only" in metrics

    cfg.model.name = "msgfm"
    with pytest.raises(ValueError, match=r"config.recipe='toy' trains a 'skysense', config.model.name is 'msgfm'"):
        recipes.check_config(cfg)
