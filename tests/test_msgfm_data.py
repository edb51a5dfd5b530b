"""msGFM's batches: one sensor each, in seeded proportional order, the same for any number of processes; pairs are cut
together, datasets are mixed."""

import collections
import itertools

import jax
import numpy as np
import pytest

from skysense_jax import cli, recipes, sensors
from skysense_jax.commands import data_bench
from skysense_jax.configs import msgfm_tiny
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches import one_sensor, views
from skysense_jax.run import plan as plans
from tests.helpers import msgfm_places
from tests.helpers.toy_objective import same


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return msgfm_places.write(tmp_path_factory.mktemp("places"))


@pytest.fixture()
def cfg(dataset):
    return msgfm_places.config(dataset)


def steps_of(cfg, count, seed=0):
    return list(itertools.islice(one_sensor.make_train_iterator(cfg, plans.make_contract(cfg), seed), count))


def test_a_batch_is_what_the_spec_says_and_holds_one_sensor(cfg):
    wanted = recipes.recipe_of(cfg).batch_spec(cfg, plans.make_contract(cfg))
    for batch in steps_of(cfg, 4):
        assert len(set(batch["sensor"].tolist())) == 1

        def check(leaf, array):
            return (leaf.shape, leaf.dtype) == (array.shape, array.dtype)

        for part in ("own", "pair", "place"):
            assert all(check(leaf, batch[part][name]) for name, leaf in wanted[part].items())
        assert check(wanted["sensor"], batch["sensor"]) and check(wanted["paired"], batch["paired"])


def test_sensors_come_in_proportion_and_every_place_once_before_any_comes_again(cfg):
    """20 places: hr and s2 all, s1 16, dsm 10; in batches of 4 a round is 5 + 5 + 4 + 2 batches (10 / 4 rounded)."""
    cfg.data.batch = 4
    contract = plans.make_contract(cfg)
    plan = one_sensor.make_plan(cfg, contract, 3)
    assert plan.rounds == {"hr": 5, "s2": 5, "s1": 4, "dsm": 2}
    rows = [[one_sensor.draw(plan, step, row) for row in range(4)] for step in range(32)]
    order = [batch[0][0] for batch in rows]
    assert all(len({name for name, _, _ in batch}) == 1 for batch in rows)
    for begin in (0, 16):
        assert collections.Counter(order[begin : begin + 16]) == plan.rounds
    assert order[:16] != order[16:] and order[:16] != sorted(order[:16])
    read = {name: [record for batch in rows for sensor, _, record in batch if sensor == name] for name in plan.names}
    for name, records in read.items():
        held = len(plan.members[name])
        assert sorted(records[:held]) == sorted(plan.members[name][:, 1]), name
    assert order != [one_sensor.draw(one_sensor.make_plan(cfg, contract, 4), step, 0)[0] for step in range(32)]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(cfg, processes):
    contract = plans.make_contract(cfg)
    whole = one_sensor.train_dataset(cfg, contract, 5)
    for step in (0, 7):
        parts = [one_sensor.train_dataset(cfg, contract, 5, rank, processes)[step] for rank in range(processes)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in ("sensor", "paired")}
        assert all((joined[name] == whole[step][name]).all() for name in joined)
        for part in ("own", "pair", "place"):
            for name in whole[step][part]:
                rows = np.concatenate([one[part][name] for one in parts])
                np.testing.assert_array_equal(rows, whole[step][part][name])
    with pytest.raises(ValueError, match="cannot be shared evenly by 3 processes"):
        one_sensor.train_dataset(cfg, contract, 5, 0, 3)


def test_a_stream_begins_at_any_step(cfg):
    contract, straight = plans.make_contract(cfg), steps_of(cfg, 5)
    late = one_sensor.make_train_iterator(cfg, contract, 0, start_step=3)
    assert same(next(late), straight[3]) and same(next(late), straight[4])
    late.close()
    assert not same(straight[3]["own"], straight[4]["own"])


def test_a_pair_is_cut_by_the_same_box(cfg):
    """The surface model is the red of hr: what is reconstructed across lies pixel on pixel."""
    names, seen = tuple(plans.make_contract(cfg)["sensors"]), 0
    for batch in steps_of(cfg, 24):
        if names[batch["sensor"][0]] not in ("hr", "dsm"):
            continue
        own, pair, both = batch["own"]["image"][..., 0], batch["pair"]["image"][..., 0], batch["paired"] > 0
        np.testing.assert_allclose(own[both], pair[both], atol=1e-3)
        assert not pair[~both].any() and not batch["pair"]["valid"][~both].any()
        assert (own[both].std((1, 2)) > 1).all()
        seen += both.sum()
    assert seen > 8


def test_the_partner_is_the_acquisition_of_the_nearest_date():
    rng = np.random.default_rng(0)
    dates = np.array([10, 50, 90, sensors.NO_DATE])
    assert one_sensor.nearest(rng, 60, dates, np.arange(4)) == 1
    assert one_sensor.nearest(rng, 60, dates, np.array([0, 2])) == 2
    drawn = {one_sensor.nearest(rng, sensors.NO_DATE, dates, np.array([0, 3])) for _ in range(50)}
    assert drawn == {0, 3} and one_sensor.nearest(rng, 60, dates, np.array([3])) == 3


def test_datasets_are_mixed_as_if_they_were_one(cfg, tmp_path):
    alone = msgfm_places.write(tmp_path / "pictures", 12, 500, ("hr",))
    cfg.data.also, cfg.data.batch = (alone,), 4
    contract = plans.make_contract(cfg)
    plan = one_sensor.make_plan(cfg, contract, 0)
    assert plan.rounds == {"hr": 8, "s2": 5, "s1": 4, "dsm": 2}
    assert one_sensor.check(cfg, contract).endswith("+noise-12-500-hr")
    drawn = [one_sensor.draw(plan, step, row) for step in range(19) for row in range(4)]
    second = [record for _, number, record in drawn if number == 1]
    assert sorted(second) == list(range(12)) and all(name == "hr" for name, number, _ in drawn if number == 1)
    whole = one_sensor.train_dataset(cfg, contract, 0)
    numbers = np.concatenate([whole[step]["place"]["index"] for step in range(19)])
    assert numbers.max() >= 20 and numbers.max() < 32


def test_what_does_not_fit_is_refused(cfg, tmp_path):
    contract = plans.make_contract(cfg)
    hr = msgfm_places.write(tmp_path / "hr", 4, 0, ("hr",))
    cfg.data.dir = hr
    with pytest.raises(ValueError, match="the model takes 'dsm', no dataset of config.data.dir and config.data.also"):
        one_sensor.check(cfg, contract)
    cfg.data.also = (msgfm_places.write(tmp_path / "s1", 4, 0, ("s1",)),)
    only = {**contract, "sensors": {"hr": contract["sensors"]["hr"]}}
    with pytest.raises(ValueError, match="holds s1, the model takes hr; leave the dataset out"):
        one_sensor.check(cfg, only)


def test_only_msgfm_learns_from_images_without_georeference(cfg):
    meta = {**dataset_records.read_metadata(cfg.data.dir), "georeferenced": False}
    dataset_records.check_dataset(meta, plans.make_contract(cfg), cfg)
    with pytest.raises(ValueError, match="has no georeference; only config.model.name='msgfm'"):
        dataset_records.check_georeferenced(meta, cfg.data.dir)


def test_holdings_are_known_without_decoding_images(cfg):
    found = dataset_records.holdings(cfg.data.dir, "train", ("s1", "dsm", "thermal"))
    np.testing.assert_array_equal(found["s1"], np.arange(20) % 5 != 3)
    np.testing.assert_array_equal(found["dsm"], np.arange(20) % 2 == 0)
    assert set(found) == {"s1", "dsm"} and views.check(cfg, plans.make_contract(cfg)) == "noise-20-0-hr-s2-s1-dsm"


def test_bench_measures_the_three_stages(cfg, dataset, capsys):
    cfg.data.batch = 4
    rates = data_bench.bench(cfg, 0.05)
    assert list(rates) == ["read", "place", "batches"]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(steps_of(cfg, 1)[0]) if isinstance(leaf, np.ndarray))
    assert 1e6 * rates["batches"].mb_per_s / rates["batches"].places_per_s == pytest.approx(size / cfg.data.batch)
    assert cli.main(["data", "bench", dataset, "--config", msgfm_tiny.__file__, "--seconds", "0.05"]) == 0
    assert capsys.readouterr().out.count(" places/s per core") == 3


def test_the_stages_that_bench_measures_are_those_of_training(cfg):
    contract = plans.make_contract(cfg)
    plan, (records, sample) = one_sensor.make_plan(cfg, contract, 0), one_sensor.stages(cfg, contract, 0)
    for number in range(2 * plan.batch):
        name, dataset, record = records[number]
        drawn = one_sensor.draw(plan, *divmod(number, plan.batch))
        assert (name, dataset) == drawn[:2] and record["index"] == drawn[2]
        one = sample(records[number], np.random.default_rng(0))
        assert plan.names[one["sensor"]] == name and one["place"]["index"] == record["index"]
