"""fit_many: every member ends where training it alone ends, together or one after the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fusedmlp.train import Member, Scaling, UsageError, ensemble, fit, fit_many, refuses_many

from . import made_data
from .engines import config, need_native, network, state_equal

made_data.need("safetensors", "matplotlib")
need_native()

ROWS = 180
FLAGS = {
    "plain": [{}, {}],
    "sgd": [
        dict(lr=0.05, momentum=0.9, weight_decay=1e-3),
        dict(lr=0.3, clip_norm=0.5, label_smoothing=0.1),
        dict(lr=0.1, lr_schedule="cosine", warmup_epochs=1.0),
    ],
    "adamw": [
        dict(optimizer="adamw", lr=1e-3, weight_decay=0.1),
        dict(optimizer="adamw", lr=1e-2, lr_schedule="linear"),
        dict(optimizer="adamw", lr=3e-3),
    ],
    "adam": [
        dict(optimizer="adam", lr=1e-2, weight_decay=0.1, clip_norm=0.5),
        dict(optimizer="adam", lr=1e-2, lr_schedule="linear"),
    ],
}


def chosen(number: int) -> torch.Tensor:
    """Rows of a member, another set and another number of them for each."""
    generator = torch.Generator().manual_seed(number)
    return torch.randperm(ROWS, generator=generator)[: ROWS - 31 * number]


def members_of(flags: list[dict], activation="relu", **common) -> list[Member]:
    members = []
    for number, settings in enumerate(flags):
        dropout = (0.0, 0.2, 0.5)[number % 3]
        net = network(sizes=(12, 16, 8, 3), dropout=dropout, seed=number, activation=activation)
        settings = config(**{"seed": 100 + number} | common | settings)
        members.append(Member(net, settings, chosen(number)))
    return members


def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    data = made_data.blobs()
    assert len(data.x_train) == ROWS
    return data.x_train, data.y_train


def alone(member: Member, x, y):
    """The member's twin, trained by `fit` with the native engine on its rows alone."""
    parts = x[member.rows], y[member.rows]
    return fit(member.model, parts, member.config.replace(engine="native"))


def assert_each_as_alone(members: list[Member], twins: list[Member], history, x, y) -> None:
    for member, twin, rows in zip(members, twins, history, strict=True):
        result = alone(twin, x, y)
        assert state_equal(member.model, twin.model)
        keys = ("train_loss", "train_accuracy")
        assert rows == [{k: row[k] for k in keys} for row in result.history]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", FLAGS)
def test_each_of_many_has_the_bits_of_training_it_alone(name, threads):
    (x, y), before = blobs(), torch.get_num_threads()
    members, twins = members_of(FLAGS[name]), members_of(FLAGS[name])
    assert refuses_many(members, x, y, "cross_entropy") == []
    try:
        torch.set_num_threads(threads)
        history = fit_many(members, x, y, loss="cross_entropy")
    finally:
        torch.set_num_threads(before)
    assert_each_as_alone(members, twins, history, x, y)
    assert not state_equal(members[0].model, members[1].model)


def test_slopes_that_are_learnt_and_squared_errors():
    data = made_data.line()
    x, y = data.x_train, data.y_train

    def made():
        nets = [network(sizes=(3, 8, 1), activation="prelu", seed=s) for s in range(2)]
        return [
            Member(n, config(lr=0.02, seed=s), torch.arange(s, len(x))) for s, n in enumerate(nets)
        ]

    members, twins = made(), made()
    assert refuses_many(members, x, y, "mse") == []
    history = fit_many(members, x, y.flatten(), loss="mse")
    assert history[0][0]["train_accuracy"] is None
    assert_each_as_alone(members, twins, history, x, y)


def test_bytes_are_scaled_inside():
    data = made_data.pictures()
    x, y = data.x_train, data.y_train

    def made():
        nets = [network(sizes=(64, 8, 4), seed=s) for s in range(3)]
        return [Member(n, config(seed=s), torch.arange(60 * s, 180)) for s, n in enumerate(nets)]

    members, twins = made(), made()
    assert refuses_many(members, x, y, "cross_entropy") == []
    history = fit_many(members, x, y, loss="cross_entropy", scaling=Scaling(255.0))
    assert_each_as_alone(members, twins, history, x, y)


def test_what_runs_one_after_the_other_has_the_same_bits():
    x, y = blobs()

    def made():
        members = members_of(FLAGS["sgd"])
        wide = network(sizes=(12, 20, 3), dropout=0.5, seed=7)
        return [*members, Member(wide, config(epochs=5, batch_size=7), chosen(1))]

    members, twins = made(), made()
    reasons = refuses_many(members, x, y, "cross_entropy")
    assert reasons == ["the members differ in epochs"]
    history = fit_many(members, x, y, loss="cross_entropy")
    assert [len(rows) for rows in history] == [3, 3, 3, 5]
    assert_each_as_alone(members, twins, history, x, y)


def test_any_model_runs_and_leaves_the_generators_alone():
    """A plain Sequential draws its masks from torch's generator, which `fit` seeds each epoch."""
    x, y = blobs()

    def made():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        return [Member(net, config(seed=4), torch.arange(90)), *members_of(FLAGS["plain"])]

    members, twins = made(), made()
    torch.manual_seed(11)
    fit_many(members, x, y, loss="cross_entropy")
    drawn = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(1))
    result = fit(twins[0].model, (x[:90], y[:90]), twins[0].config)
    assert result.summary["engine"] == "autograd"
    assert state_equal(members[0].model, twins[0].model)


def test_one_that_diverges_is_marked_and_the_others_go_on():
    x, y = blobs()
    flags = [dict(lr=0.1), dict(lr=1e30), dict(lr=0.2)]
    for engine in ("auto", "autograd"):
        members, twins = members_of(flags, engine=engine), members_of(flags)
        history = fit_many(members, x, y, loss="cross_entropy")
        assert [len(rows) for rows in history] == [3, 3, 3]
        assert all(math.isnan(v) for row in history[1] for v in row.values())
        assert all(math.isfinite(v) for n in (0, 2) for row in history[n] for v in row.values())
        if engine == "auto":
            for n in (0, 2):
                alone(twins[n], x, y)
                assert state_equal(members[n].model, twins[n].model)


def test_after_each_epoch_the_models_hold_its_weights():
    x, y = blobs()
    members = members_of(FLAGS["adamw"][:1] * 2)
    seen, said = [], []

    def on_epoch(done):
        members[1].model.eval()  # as a caller that tests may leave it
        seen.append([p.detach().clone() for p in members[1].model.parameters()])

    fit_many(
        members, x, y, loss="cross_entropy", on_epoch=on_epoch, progress=lambda *a: said.append(a)
    )
    assert said == [(1, 3), (2, 3), (3, 3)]
    for epochs, weights in enumerate(seen, start=1):
        twin = members_of(FLAGS["adamw"][:1] * 2, epochs=epochs)[1]
        alone(twin, x, y)
        assert all(map(torch.equal, weights, twin.model.parameters()))


def test_64_run_together_and_65_one_after_the_other():
    x, y = blobs()

    def made(count):
        nets = [network(sizes=(12, 4, 3), seed=s) for s in range(count)]
        settings = [config(epochs=1, batch_size=90, seed=s) for s in range(count)]
        return [Member(n, c, torch.arange(ROWS)) for n, c in zip(nets, settings, strict=True)]

    many, more = made(64), made(65)
    assert refuses_many(many, x, y, "cross_entropy") == []
    assert "at most 64" in refuses_many(more, x, y, "cross_entropy")[0]
    first = fit_many(many, x, y, loss="cross_entropy")
    assert fit_many(more, x, y, loss="cross_entropy")[:64] == first
    assert all(state_equal(a.model, b.model) for a, b in zip(many, more, strict=False))
    assert fit_many([], x, y, loss="cross_entropy") == []


def test_one_member_takes_all_threads_in_long_calls(monkeypatch):
    """Calls of one step, as a slow machine would make them, change no bit either."""
    monkeypatch.setattr("fusedmlp.train.native_many.CALL_SECONDS", 0.0)
    x, y = blobs()
    members, twins = members_of(FLAGS["adamw"][:1]), members_of(FLAGS["adamw"][:1])
    history = fit_many(members, x, y, loss="cross_entropy")
    assert_each_as_alone(members, twins, history, x, y)


DIFFER = {
    "shape": (lambda: network(sizes=(12, 9, 8, 3)), {}, "differ in the shape of the network"),
    "activation": (lambda: network(sizes=(12, 16, 8, 3), activation="gelu"), {}, "the shape of"),
    "batch": (None, dict(batch_size=16), "differ in batch size"),
    "epochs": (None, dict(epochs=9), "differ in epochs"),
    "optimiser": (None, dict(optimizer="adamw"), "differ in the optimiser"),
    "precision": (None, dict(precision="bf16"), "member 1: it computes in fp32"),
    "engine": (None, dict(engine="autograd"), "member 1: engine autograd was asked for"),
    "backend": (None, dict(backend="reference"), "member 1: backend 'reference' was asked for"),
}


@pytest.mark.parametrize("case", DIFFER)
def test_what_cannot_share_a_call_says_why(case):
    make, settings, message = DIFFER[case]
    first, second = members_of([{}, settings])
    second = second if make is None else Member(make(), second.config, second.rows)
    assert any(
        message in reason for reason in refuses_many([first, second], *blobs(), "cross_entropy")
    )


WRONG = {
    "rows": (dict(rows=torch.tensor([ROWS])), r"member 1: rows must be in \[0, 180\)"),
    "no rows": (dict(rows=torch.arange(0)), r"member 1: rows must be \(n,\) int64 with n > 0"),
    "loss": (dict(loss="huber"), "loss must be one of cross_entropy, mse"),
    "labels": (dict(y=torch.zeros(ROWS)), r"y must be \(n,\) int64 classes"),
    "targets": (dict(loss="mse"), "y must be float targets for mse"),
    "sizes": (dict(y=torch.arange(3)), "one target a row"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_cannot_be_are_usage_errors(case):
    changes, message = WRONG[case]
    x, y = blobs()
    first, second = members_of(FLAGS["plain"])
    second = Member(second.model, second.config, changes.get("rows", second.rows))
    arguments = ([first, second], x, changes.get("y", y))
    loss = changes.get("loss", "cross_entropy")
    with pytest.raises(UsageError, match=message):
        fit_many(*arguments, loss=loss)
    with pytest.raises(UsageError, match=message):
        refuses_many(*arguments, loss)


def test_members_must_have_models_of_their_own():
    first, second = members_of(FLAGS["plain"])
    second = Member(first.model, second.config, second.rows)
    with pytest.raises(UsageError, match="0 and 1 share parameters"):
        fit_many([first, second], *blobs(), loss="cross_entropy")


def test_the_call_is_taken_where_there_are_no_reasons(monkeypatch):
    called = []
    steps = ensemble.NativeMany.steps
    monkeypatch.setattr(
        ensemble.NativeMany, "steps", lambda self, o: (called.append(len(o)), steps(self, o))
    )
    fit_many(members_of(FLAGS["sgd"]), *blobs(), loss="cross_entropy")
    assert called == [3, 3, 3]
