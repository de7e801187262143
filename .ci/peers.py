"""The no-op task of each peer, for .ci/bench: its workers import this module, and so
does the submitter.  submit() starts a task and returns a key; wait(keys, seconds) waits
in one blocking call until any of those has ended, and returns the ones that have.
BENCH_PEER names the peer and RQ_REDIS_URL its broker."""

import json
import os

import redis

PEER, URL = os.environ["BENCH_PEER"], os.environ["RQ_REDIS_URL"]
connection = redis.Redis.from_url(URL)


def no_op(input):
    return None


if PEER == "rq":  # a result is an entry of a stream of its own
    import rq
    from rq.results import Result

    queue = rq.Queue(connection=connection)

    def submit():
        return Result.get_key(queue.enqueue("peers.no_op", "x").id).encode()

    def wait(keys, seconds):
        streams = dict.fromkeys(keys, "0-0")
        return list(dict(connection.xread(streams, block=int(1000 * seconds)) or {}))

elif PEER == "celery":  # the client subscribes to a result, as AsyncResult.get does
    from celery import Celery

    app = Celery("peers", broker=URL, backend=URL)
    task = app.task(name="no_op")(no_op)
    ready = []

    def submit():
        result = task.delay("x")
        result.then(lambda result: ready.append(result.id))
        return result.id

    def wait(keys, seconds):
        if not ready:
            app.backend.result_consumer.drain_events(timeout=seconds)
        found = ready[:]
        ready.clear()
        return found

elif PEER == "huey":  # a worker pushes to each result's list, as Result.get expects
    from huey import RedisHuey

    huey = RedisHuey("bench", url=URL, store_none=True, notify_result=True)
    task = huey.task()(no_op)
    prefix = os.fsdecode(huey.storage.notify_prefix)

    def submit():
        return task("x").id

    def wait(keys, seconds):
        found = connection.blpop([prefix + key for key in keys], seconds)
        ended = [found[0].decode()[len(prefix) :]] if found else []
        for key in ended:
            huey.result(key)
        return ended

elif PEER == "dramatiq":  # a result is a list of one element
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker
    from dramatiq.results import Results
    from dramatiq.results.backends import RedisBackend

    backend, broker = RedisBackend(url=URL), RedisBroker(url=URL)
    broker.add_middleware(Results(backend=backend, store_results=True))
    dramatiq.set_broker(broker)
    task = dramatiq.actor(no_op)

    def submit():
        return backend.build_message_key(task.send("x")).encode()

    def wait(keys, seconds):
        found = connection.blpop(list(keys), seconds)
        if found:
            backend.unwrap_result(json.loads(found[1]))
        return [found[0]] if found else []
