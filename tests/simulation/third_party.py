"""Apps as a stranger writes them against Flower's public API: nothing here knows of fedinfer."""

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from sklearn.linear_model import LogisticRegression
from torch import nn

FEATURES, CLASSES = 4, 2


def rows_of(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """A separable problem, cut by the partition id."""
    partition, partitions = context.node_config["partition-id"], context.node_config["num-partitions"]
    generator = np.random.default_rng([partition, partitions])
    x = generator.normal(size=(40, FEATURES))
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0.0).astype(np.int64)


def server_app(arrays: ArrayRecord, rounds: int) -> ServerApp:
    """The stock strategy with its defaults: all nodes train, and all evaluate."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = ConfigRecord({"lr": context.run_config["lr"]})
        result = FedAvg().start(grid=grid, initial_arrays=arrays, train_config=config, num_rounds=rounds)
        context.state["arrays"] = result.arrays
        context.state["accuracy"] = MetricRecord(dict(result.evaluate_metrics_clientapp[rounds]))

    return app


def torch_app() -> tuple[ServerApp, ClientApp]:
    """As the quickstart with PyTorch."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        net = network()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = (torch.from_numpy(part) for part in rows_of(context))
        optimiser = torch.optim.SGD(net.parameters(), lr=message.content["config"]["lr"])
        for _ in range(5):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(net(x.float()), y)
            loss.backward()
            optimiser.step()
        metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(x)})
        content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        net = network()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = (torch.from_numpy(part) for part in rows_of(context))
        accuracy = (net(x.float()).argmax(1) == y).float().mean().item()
        metrics = MetricRecord({"accuracy": accuracy, "num-examples": len(x)})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

    return server_app(ArrayRecord(network().state_dict()), rounds=5), app


def sklearn_app() -> tuple[ServerApp, ClientApp]:
    """As the quickstart with scikit-learn: a logistic regression that starts from what it was sent."""

    def model(arrays: ArrayRecord) -> LogisticRegression:
        coefficients, intercept = arrays.to_numpy_ndarrays()
        made = LogisticRegression(max_iter=3, warm_start=True)
        made.classes_, made.coef_, made.intercept_ = np.arange(CLASSES), coefficients, intercept
        return made

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        import warnings

        x, y = rows_of(context)
        made = model(message.content["arrays"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.fit(x, y)
        metrics = MetricRecord({"num-examples": len(x)})
        arrays = ArrayRecord([made.coef_, made.intercept_])
        return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        x, y = rows_of(context)
        metrics = MetricRecord({"accuracy": model(message.content["arrays"]).score(x, y), "num-examples": len(x)})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

    return server_app(ArrayRecord([np.zeros((1, FEATURES)), np.zeros(1)]), rounds=2), app


def numpy_app() -> tuple[ServerApp, ClientApp]:
    """With NumPy alone, and a node's own state: it counts its rounds."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (weights,) = message.content["arrays"].to_numpy_ndarrays()
        x, y = rows_of(context)
        for _ in range(20):
            probabilities = 1.0 / (1.0 + np.exp(-x @ weights))
            weights = weights - message.content["config"]["lr"] * x.T @ (probabilities - y) / len(x)
        turns = context.state.setdefault("turns", MetricRecord({"n": 0}))
        turns["n"] += 1
        metrics = MetricRecord({"turns": turns["n"], "num-examples": len(x)})
        return Message(content=RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        (weights,) = message.content["arrays"].to_numpy_ndarrays()
        x, y = rows_of(context)
        accuracy = float(((x @ weights > 0.0) == y).mean())
        metrics = MetricRecord({"accuracy": accuracy, "turns": context.state["turns"]["n"], "num-examples": len(x)})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

    return server_app(ArrayRecord([np.zeros(FEATURES)]), rounds=3), app
