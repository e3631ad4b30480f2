"""Keys whose values are the entries of a table, which may grow: what `Literal` is for a list that cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from lcm_kit import families, samplers


@dataclass(frozen=True)
class OneOf:
    """In `Annotated[str, OneOf(names)]`: the text must be one of `names()` when it is validated."""

    names: Callable[[], list[str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """pydantic's hook: text, then the table."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value not in (allowed := self.names()):
            raise PydanticCustomError(
                "choice", "{value} is none of {allowed}", {"value": value, "allowed": ", ".join(allowed)}
            )
        return value


@dataclass(frozen=True)
class OneSampler(OneOf):
    """One of `names()`, or one of them with a gamma, as `tcd:0.5`, in the one spelling that results have."""

    def _check(self, value: str) -> str:
        if value.partition(":")[0] not in self.names():
            return super()._check(value)
        return samplers.spelled(value)  # its `UserError` is a sentence for the key already


AdapterSampler = Annotated[str, OneSampler(samplers.for_adapter)]
BaseSampler = Annotated[str, OneSampler(samplers.for_base)]
# Of the random weights of a benchmark: a generation, or the embedded base
Structure = Annotated[str, OneOf(lambda: [*(each.name for each in families.unpruned()), "tiny"])]
