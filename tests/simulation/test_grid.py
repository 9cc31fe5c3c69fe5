"""The in-process grid shows a ServerApp what Flower's engines show it."""

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from fedinfer.simulation import InProcessGrid, run_in_process

client = ClientApp()


@client.query("count")
def count(message: Message, context: Context) -> Message:
    """Count the calls in this node's own state; fail where the node says so."""
    if context.node_config.get("fail"):
        raise ZeroDivisionError("as asked")
    record = context.state.config_records.setdefault("calls", ConfigRecord({"n": 0}))
    record["n"] = int(record["n"]) + 1
    answer = ConfigRecord({"n": record["n"], "name": context.node_config["name"], "rate": context.run_config["rate"]})
    return Message(RecordDict({"answer": answer}), reply_to=message)


def server_of(rounds: int) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        for number in range(rounds):
            nodes = list(grid.get_node_ids())
            messages = [Message(RecordDict(), node, "query.count", group_id=str(number)) for node in nodes]
            for reply in grid.send_and_receive(messages):
                assert reply.metadata.message_type == "query.count"
                node = str(reply.metadata.src_node_id)
                if reply.has_error():
                    context.state[node] = ConfigRecord({"code": reply.error.code, "reason": reply.error.reason or ""})
                else:
                    context.state[node] = reply.content["answer"]

    return app


def test_each_node_has_its_own_state_and_an_exception_is_an_error_reply() -> None:
    seen: list[str] = []
    context = run_in_process(
        server_of(3),
        client,
        nodes=[{"name": "a"}, {"name": "b"}, {"fail": True}],
        run_config={"rate": 0.5},
        progress=lambda group, node: seen.append(group),
    )
    a, b, failed = context.state.values()
    assert (a["n"], a["name"], a["rate"]) == (3, "a", 0.5)
    assert (b["n"], b["name"]) == (3, "b")
    assert failed["reason"] == "<class 'ZeroDivisionError'>:<'as asked'>"
    assert seen == ["0"] * 3 + ["1"] * 3 + ["2"] * 3


def test_two_runs_do_not_share_state_and_leave_the_process_as_it_was() -> None:
    before = TaskIdentity._run_id
    for _ in range(2):
        context = run_in_process(server_of(1), client, nodes=[{"name": "a"}], run_config={"rate": 1.0})
        (a,) = context.state.values()
        assert a["n"] == 1
    assert TaskIdentity._run_id == before


def test_messages_are_pulled_once_and_a_timeout_leaves_the_rest() -> None:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        node = next(iter(grid.get_node_ids()))
        (sent,) = grid.push_messages([grid.create_message(RecordDict(), "query.count", node, "1")])
        assert len(list(grid.pull_messages([sent]))) == 1
        assert list(grid.pull_messages([sent])) == []
        late = [grid.create_message(RecordDict(), "query.count", node, "1") for _ in range(2)]
        assert len(list(grid.send_and_receive(late, timeout=-1.0))) == 0
        with pytest.raises(ValueError, match="got destination node 99"):
            grid.push_messages([grid.create_message(RecordDict(), "query.count", 99, "1")])
        context.state["done"] = ConfigRecord({"yes": True})

    context = run_in_process(app, client, nodes=[{"name": "a"}], run_config={"rate": 1.0})
    assert context.state["done"]["yes"]


def test_the_grid_has_every_method_of_flowers() -> None:
    assert not InProcessGrid.__abstractmethods__
