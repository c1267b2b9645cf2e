"""use_backend and dropout_state belong to the context: to each thread, to each asyncio task."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedmlp
import fusedmlp.functional as FF
from fusedmlp import context, fuse
from fusedmlp.backends import registry
from fusedmlp.spec import philox

X = torch.ones(8, 16)


def _mask(seed, stream=0, row_offset=0):
    return philox.dropout_mask(seed, stream, 8, 16, 0.5, row_offset=row_offset)


def _drawn(f=FF.dropout):
    return f(X, 0.5) != 0


def _in_thread(f, *args):
    found = []
    thread = threading.Thread(target=lambda: found.append(f(*args)))
    thread.start()
    thread.join()
    assert found, "the thread ended with an error"
    return found[0]


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = context.now()
    yield
    now = context.now()
    assert (now.backend, now.scopes) == (before.backend, before.scopes) == (None, ())
    assert context._traced.stack == ()


def test_a_new_thread_starts_without_settings_and_leaves_none():
    def other():
        before = registry.explicit(None), len(context.now().scopes)
        fusedmlp.use_backend("native")
        fusedmlp.dropout_state(9).__enter__()
        return before

    with fusedmlp.use_backend("reference"), fusedmlp.dropout_state(3):
        assert _in_thread(other) == (None, 0)
        assert registry.explicit(None) == "reference"
        assert torch.equal(_drawn(), _mask(3))


def test_two_threads_inside_blocks_at_once_see_their_own():
    barrier = threading.Barrier(2, timeout=30)
    found = {}

    def run(seed, name):
        with fusedmlp.use_backend(name), fusedmlp.dropout_state(seed):
            barrier.wait()
            found[seed] = registry.explicit(None), torch.equal(_drawn(), _mask(seed))
            barrier.wait()

    threads = [threading.Thread(target=run, args=a) for a in ((1, "reference"), (2, "native"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[1] == ("reference", True)
    if registry._BY_NAME["native"].reasons_against("cpu", torch.float32):
        pytest.skip("native cannot run here")
    assert found[2] == ("native", True)


def test_asyncio_tasks_inherit_and_do_not_see_each_other():
    found = {}

    async def task(seed):
        inherited = registry.explicit(None)
        with fusedmlp.dropout_state(seed):
            await asyncio.sleep(0)
            fusedmlp.use_backend(None)
            await asyncio.sleep(0)
            found[seed] = inherited, torch.equal(_drawn(), _mask(seed))

    async def main():
        with fusedmlp.use_backend("reference"):
            await asyncio.gather(*(task(seed) for seed in (1, 2, 3)))
            return registry.explicit(None)

    assert asyncio.run(main()) == "reference"
    assert found == {seed: ("reference", True) for seed in (1, 2, 3)}


def test_one_state_object_serves_nested_blocks_and_many_threads():
    shared = fusedmlp.dropout_state(5)

    def run():
        with shared, shared:
            with fusedmlp.dropout_state(6, stream=2, row_offset=3):
                inner = torch.equal(_drawn(), _mask(6, 2, 3))
            return inner and torch.equal(_drawn(), _mask(5))

    with shared:
        assert _in_thread(run) and run()
        assert torch.equal(_drawn(), _mask(5))


def test_a_backend_set_inside_a_state_block_outlives_it():
    with fusedmlp.use_backend(None):
        with fusedmlp.dropout_state(5):
            fusedmlp.use_backend("reference")
        assert registry.explicit(None) == "reference"


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_autograd_repeats_in_a_thread_of_its_own_has_the_settings_of_the_caller(reentrant):
    """As on a GPU. On a CPU backward changes threads where it is nested more than 60 deep."""
    w = torch.randn(16, 16, requires_grad=True)
    seen = []

    def block(x):
        seen.append((threading.get_ident(), registry.explicit(None)))
        return FF.linear_act(x, w, None, "gelu", p=0.5)

    class Nest(torch.autograd.Function):
        """backward of backward of ..., `depth` times, then that of a checkpointed block."""

        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                if ctx.depth:
                    y = Nest.apply(x, ctx.depth - 1)
                else:
                    y = checkpoint(block, x, use_reentrant=reentrant)
            y.backward(dy)
            return x.grad, None

    grads = []
    for depth in (0, 80):
        x, w.grad = X.clone().requires_grad_(), None
        with fusedmlp.use_backend("reference"), fusedmlp.dropout_state(4):
            Nest.apply(x, depth).sum().backward()
        grads += [x.grad, w.grad]
    torch.testing.assert_close(grads[:2], grads[2:])
    assert {name for _, name in seen} == {"reference"}
    assert len({ident for ident, _ in seen}) > 1, "all of it ran in one thread"


def _compiled(f, **kwargs):
    torch._dynamo.reset()
    return torch.compile(f, backend="eager", **kwargs)


def test_a_compiled_function_follows_the_context_of_each_thread():
    compiled = _compiled(lambda x, p: FF.dropout(x, p), fullgraph=True)

    def run(seed):
        with fusedmlp.dropout_state(seed, row_offset=seed):
            return torch.equal(_drawn(compiled), _mask(seed, 0, seed))

    assert run(1) and _in_thread(run, 2)
    with fusedmlp.dropout_state(1):
        assert _in_thread(run, 3)
        assert not torch.equal(_in_thread(_drawn, compiled), _mask(1))
        assert torch.equal(_drawn(compiled), _mask(1))


def test_blocks_inside_a_compiled_function():
    state = torch.tensor([5, 1])

    def f(x):
        with fusedmlp.dropout_state(state), fusedmlp.use_backend("reference"):
            with fusedmlp.dropout_state(7):
                inner = FF.dropout(x, 0.5)
            return inner, FF.dropout(x, 0.5), registry.explicit(None)

    inner, outer, named = _compiled(f, fullgraph=True)(X)
    assert torch.equal(inner != 0, _mask(7)) and torch.equal(outer != 0, _mask(5, 1))
    assert named == "reference"


def test_a_graph_break_inside_a_block_keeps_it_and_no_other_thread_sees_it():
    found = []

    def f(x):
        with fusedmlp.dropout_state(5), fusedmlp.use_backend("reference"):
            y = FF.dropout(x, 0.5)
            torch._dynamo.graph_break()
            found.append((torch.equal(_drawn(), _mask(5)), registry.explicit(None)))
            found.append(_in_thread(registry.explicit, None))
            return y, FF.dropout(x, 0.5)

    for y in _compiled(f)(X):
        assert torch.equal(y != 0, _mask(5))
    assert found == [(True, "reference"), None]


def test_settings_are_handed_down_to_every_layer_of_a_container():
    net = fuse(nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5))))
    with fusedmlp.dropout_state(4, row_offset=2):
        want = net(X)
    settings = context.Settings("reference", (fusedmlp.dropout_state(4, row_offset=2),))
    with fusedmlp.dropout_state(9), fusedmlp.use_backend("native"):
        for _ in range(2):
            assert torch.equal(net(X, settings), want)


def test_grid_search_in_threads_finds_the_scores_of_one_thread():
    """Estimators once set the state of the masks for the whole process, and left it set."""
    joblib = pytest.importorskip("joblib")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV

    from fusedmlp.sklearn import FusedMLPClassifier

    draw = np.random.RandomState(0)
    x, y = draw.randn(90, 5), draw.randint(0, 3, 90)
    before = torch.get_rng_state()

    def scores(jobs):
        model = FusedMLPClassifier(dropout=0.3, max_iter=4, random_state=0, backend="reference")
        search = GridSearchCV(model, {"alpha": [1e-4, 1e-2, 1.0]}, cv=3)
        with joblib.parallel_config("threading", n_jobs=jobs):
            search.fit(x, y, sample_weight=np.ones(90))
        return search.cv_results_["mean_test_score"].tolist()

    with pytest.warns(ConvergenceWarning):
        assert scores(4) == scores(1)
    assert registry.explicit(None) is None and context.now().scopes == ()
    assert torch.equal(torch.get_rng_state(), before)
    masks = {tuple(_drawn().flatten().tolist()) for _ in range(3)}
    assert len(masks) == 3, "every dropout of the process has the same mask"
