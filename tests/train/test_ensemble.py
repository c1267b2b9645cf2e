"""fit_many: every member ends where training it alone ends, together or one after the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fusedmlp.train import (
    Member,
    Scaling,
    UsageError,
    fit,
    fit_many,
    reasons_against_many,
)
from fusedmlp.train import (
    many as ensemble,
)
from fusedmlp.train.engines.native import Native
from fusedmlp.train.engines.native_many import NativeMany, Share

from .. import made_data
from ..engines import OPTIMIZERS, config, need_native, network, state_equal, task_of

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
    assert reasons_against_many(members, x, y, "cross_entropy") == []
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
    assert reasons_against_many(members, x, y, "mse") == []
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
    assert reasons_against_many(members, x, y, "cross_entropy") == []
    history = fit_many(members, x, y, loss="cross_entropy", scaling=Scaling(255.0))
    assert_each_as_alone(members, twins, history, x, y)


def test_all_but_the_data_may_differ_in_one_call():
    x, y = blobs()

    def made():
        shapes = {
            (12, 16, 8, 3): dict(),
            (12, 20, 3): dict(epochs=5, batch_size=7),
            (12, 3): dict(optimizer="adamw", lr=0.01, lr_schedule="cosine", batch_size=500),
            (12, 9, 9, 9, 3): dict(momentum=0.9, epochs=1, clip_norm=1.0),
            (12, 10, 3): dict(lr=0.1, lr_schedule="linear", warmup_epochs=1.5, epochs=7),
        }
        return [
            Member(
                network(sizes=sizes, dropout=0.3, activation=activation, seed=n),
                config(seed=n, **settings),
                chosen(n % 3),
            )
            for n, ((sizes, settings), activation) in enumerate(
                zip(shapes.items(), ("relu", "gelu", "prelu", "tanh", "silu"), strict=True)
            )
        ]

    members, twins = made(), made()
    assert reasons_against_many(members, x, y, "cross_entropy") == []
    history = fit_many(members, x, y, loss="cross_entropy")
    assert [len(rows) for rows in history] == [3, 5, 3, 1, 7]
    assert_each_as_alone(members, twins, history, x, y)


def test_what_runs_one_after_the_other_has_the_same_bits(monkeypatch):
    monkeypatch.setattr(ensemble, "MAX_TOGETHER", 2)
    x, y = blobs()
    members, twins = (members_of(FLAGS["sgd"]) for _ in range(2))
    reasons = reasons_against_many(members, x, y, "cross_entropy")
    assert reasons == ["at most 2 networks are trained in one call, got 3"]
    history = fit_many(members, x, y, loss="cross_entropy")
    assert_each_as_alone(members, twins, history, x, y)


def test_short_epochs_share_a_call_and_end_where_a_loss_does(monkeypatch):
    """The second member's loss overflows in its third epoch, in the middle of a call: its weights
    must be those that a call for each epoch leaves."""
    x, y = blobs()
    # A step multiplies the weights by 1 - lr * weight_decay.
    flags = [dict(), dict(lr=1.0, weight_decay=1000.0), dict(epochs=4)]

    def made():
        nets = [network(sizes=(12, 3), seed=n) for n in range(3)]
        settings = [config(**{"epochs": 9, "seed": n} | f) for n, f in enumerate(flags)]
        return [Member(net, c, chosen(1)) for net, c in zip(nets, settings, strict=True)]

    calls, call = [], NativeMany._call
    monkeypatch.setattr(
        NativeMany, "_call", lambda self, shares: (calls.append(len(shares)), call(self, shares))[1]
    )
    monkeypatch.setattr("fusedmlp.train.engines.native_many.FIRST_CALL_STEPS", 1000.0)
    members, twins = made(), made()
    history = fit_many(members, x, y, loss="cross_entropy")
    assert calls == [3]
    lost = [math.isnan(row["train_loss"]) for row in history[1]]
    assert lost == [False] * 2 + [True] * 7
    calls.clear()
    said = []
    slow = fit_many(twins, x, y, loss="cross_entropy", on_epoch=said.append)
    assert calls == [3, 3, 3, 2, 1, 1, 1, 1, 1] and said == list(range(1, 10))
    assert str(history) == str(slow)  # nan is not equal to itself
    for member, twin in zip(members, twins, strict=True):
        for a, b in zip(member.model.parameters(), twin.model.parameters(), strict=True):
            assert torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


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
    assert reasons_against_many(many, x, y, "cross_entropy") == []
    assert "at most 64" in reasons_against_many(more, x, y, "cross_entropy")[0]
    first = fit_many(many, x, y, loss="cross_entropy")
    assert fit_many(more, x, y, loss="cross_entropy")[:64] == first
    assert all(state_equal(a.model, b.model) for a, b in zip(many, more, strict=False))
    assert fit_many([], x, y, loss="cross_entropy") == []


def test_one_member_takes_all_threads_in_long_calls(monkeypatch):
    """Calls of one step, as a slow machine would make them, change no bit either."""
    monkeypatch.setattr("fusedmlp.train.engines.native_many.CALL_SECONDS", 0.0)
    x, y = blobs()
    members, twins = members_of(FLAGS["adamw"][:1]), members_of(FLAGS["adamw"][:1])
    history = fit_many(members, x, y, loss="cross_entropy")
    assert_each_as_alone(members, twins, history, x, y)


DIFFER = {
    "model": (
        lambda: nn.Sequential(nn.Linear(12, 4), nn.Dropout(0.5), nn.Linear(4, 3)),
        {},
        "member 1: an nn.Sequential draws its dropout masks",
    ),
    "optimiser": (None, dict(engine="graph"), "member 1: engine graph was asked for"),
    "precision": (None, dict(precision="fp16"), "member 1: it computes in fp32 or bf16"),
    "engine": (None, dict(engine="autograd"), "member 1: engine autograd was asked for"),
    "backend": (None, dict(backend="reference"), "member 1: backend 'reference' was asked for"),
}


@pytest.mark.parametrize("case", DIFFER)
def test_what_cannot_share_a_call_says_why(case):
    make, settings, message = DIFFER[case]
    first, second = members_of([{}, settings])
    second = second if make is None else Member(make(), second.config, second.rows)
    assert any(
        message in reason
        for reason in reasons_against_many([first, second], *blobs(), "cross_entropy")
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
        reasons_against_many(*arguments, loss)


def test_members_must_have_models_of_their_own():
    first, second = members_of(FLAGS["plain"])
    second = Member(first.model, second.config, second.rows)
    with pytest.raises(UsageError, match="0 and 1 share parameters"):
        fit_many([first, second], *blobs(), loss="cross_entropy")


def test_long_epochs_take_several_calls(monkeypatch):
    """The first call is of one step, and the next are longer: Ctrl-C is seen between them."""
    calls, run = [], NativeMany._call

    def spy(self, shares):
        calls.append([len(share.order) for share in shares])
        return run(self, shares)

    monkeypatch.setattr(NativeMany, "_call", spy)
    x, y = blobs()
    fit_many(members_of(FLAGS["sgd"], epochs=1), x, y, loss="cross_entropy")
    assert calls[0] == [32, 32, 32] and len(calls) == 2
    assert [a + b for a, b in zip(*calls, strict=True)] == [len(chosen(n)) for n in range(3)]


SHARES = {
    "epochs": (lambda order: (order[:-1], 32, 3), "equally many rows for each of its epochs"),
    "rows": (lambda order: (order + 1, 32, 3), r"rows of the data, in \[0, 180\)"),
    "batch": (lambda order: (order, -32, 3), "batch must be at least 1"),
}


@pytest.mark.parametrize("case", SHARES)
def test_the_op_reads_no_row_that_is_not_there(case):
    change, message = SHARES[case]
    [member] = members_of([{}])
    task = task_of(member.model, made_data.blobs(), OPTIMIZERS["sgd"])
    share = Share(Native(task), *change(torch.arange(ROWS).repeat(3)))
    before = [p.detach().clone() for p in member.model.parameters()]
    many = NativeMany()
    many.chunk = 1000.0
    with pytest.raises(RuntimeError, match=message):
        many.run([share, share])
    assert all(map(torch.equal, before, member.model.parameters()))


def test_the_op_takes_one_weight_a_row_of_the_data():
    [member] = members_of([{}])
    task = task_of(member.model, made_data.blobs(), OPTIMIZERS["sgd"])
    task.row_weights = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"train: weights must have 180 elements, got \(3,\)"):
        Native(task).steps(torch.arange(ROWS), 32)
