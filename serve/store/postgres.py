"""How long PostgreSQL may be silent: a server that stands still, or is cut off, closes nothing and refuses nothing.

The server itself ends a statement that takes too long, unless the URL, the service file or the role says how long it
may take. Should it not do even that, the connection is given up here: TCP's own timeouts do not see a server whose
machine still answers, and no setting of libpq does.
"""

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import psycopg

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5
"""For each host, where the URL gives no ``connect_timeout``."""
_MARGIN_S = 5.0
"""Between the server's limit and ours, for what is on its way."""
_LIMIT = "SELECT set_config('statement_timeout', %s, false) WHERE current_setting('statement_timeout') = '0'"


class Connection(psycopg.Connection[Any]):
    """A connection that closes itself when the server falls silent.

    Attributes:
        silence_s: for how long it may say nothing while it is waited for.
    """

    silence_s: float = CONNECT_TIMEOUT_S

    def wait(self, gen: Any, *arguments: Any, **options: Any) -> Any:
        """See ``psycopg.Connection.wait``.

        Raises:
            OperationalError: nothing came for ``silence_s``; the connection is closed.
        """
        return super().wait(_heard(gen, self.silence_s, self._give_up), *arguments, **options)

    def _give_up(self) -> psycopg.OperationalError:
        self.close()
        return psycopg.OperationalError(f"the database has not answered for {self.silence_s:g} s")


def connect(arguments: Any, options: Any, answer_s: float) -> Connection:
    """A new connection, given what ``psycopg.connect`` is given.

    Args:
        arguments: by position.
        options: by name.
        answer_s: for how long a statement may run.

    Raises:
        OperationalError: there is no server, or it does not answer.
    """
    connection = Connection.connect(*arguments, **{"connect_timeout": CONNECT_TIMEOUT_S, **options})
    connection.silence_s = answer_s + _MARGIN_S
    try:
        connection.execute(_LIMIT, [f"{1000 * answer_s:.0f}"])
        connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection


def _heard(
    waiting: Generator[Any, Any, T], silence_s: float, give_up: Callable[[], Exception]
) -> Generator[Any, Any, T]:
    """The steps of a wait, each of which begins when there is something to read or write, or nothing for a moment."""
    heard_at = time.monotonic()
    ready = None
    while True:
        try:
            wanted = waiting.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result
        ready = yield wanted
        now = time.monotonic()
        if ready:
            heard_at = now
        elif now - heard_at > silence_s:
            raise give_up()
