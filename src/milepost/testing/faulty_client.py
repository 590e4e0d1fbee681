"""An obstore client that fails on command: at request k, before or after the store has acted, once or permanently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from obstore.exceptions import GenericError

ClientFault = Literal["busy", "cut", "lost", "twice", "killed", "killed after"]
CLIENT_FAULTS: tuple[ClientFault, ...] = ("busy", "cut", "lost", "twice", "killed", "killed after")

_READS = frozenset({"get", "head", "list", "list_with_delimiter"})


class Killed(BaseException):
    """Raised by every request of a killed process, which does nothing more."""


class FaultyClient:
    """Forwards requests to ``inner`` and fails at request ``fail_at`` (from 0; None never fails).

    ``busy``          the store answers 503
    ``cut``           the connection is cut before the request reaches the store
    ``lost``          the store acts, the answer is lost
    ``twice``         the store acts twice, the second answer is returned
    ``killed``        the process dies before the request: this one and all later ones raise ``Killed``
    ``killed after``  the process dies when the store has acted
    """

    def __init__(self, inner: Any, *, fail_at: int | None = None, fault: ClientFault = "busy"):
        self.inner = inner
        self.requests: list[str] = []
        self._fail_at = fail_at
        self._fault = fault
        self._is_dead = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        act = getattr(self.inner, name)

        def request(*args: Any, **options: Any) -> Any:
            if self._is_dead:
                raise Killed
            self.requests.append(f"{name} {args[0] if args else ''}")
            if len(self.requests) - 1 != self._fail_at:
                return act(*args, **options)
            return self._break(name, lambda: act(*args, **options))

        return request

    def _break(self, name: str, act: Callable[[], Any]) -> Any:
        match self._fault:
            case "busy":
                raise GenericError("Server returned non-2xx status code: 503 Service Unavailable")
            case "killed":
                self._is_dead = True
                raise Killed
            case "cut":
                raise GenericError("HttpError { kind: Connect")
            case "twice":
                if name not in _READS:
                    act()
                return act()
        try:
            act()
        finally:
            self._is_dead = self._fault == "killed after"
        if self._is_dead:
            raise Killed
        raise GenericError("HttpError { kind: Interrupted")
