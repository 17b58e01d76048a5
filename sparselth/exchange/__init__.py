"""Tickets in the files of others: `table` says what a format is, one a file."""

from sparselth.exchange.table import (
    FORMATS,
    Format,
    Found,
    Given,
    export_ticket,
    import_ticket,
    module_of,
    register,
)

__all__ = ["FORMATS", "Format", "Found", "Given", "export_ticket", "import_ticket", "module_of", "register"]
