"""The layer symbols that exist, and their one-line descriptions: known without importing torch.

The four of the published models are here from the start; `nemohybrid.model.mixer.mixer` adds others.
"""

from nemohybrid.errors import ConfigError
from nemohybrid.pattern import DEFAULT_SYMBOLS, Pattern, check_symbol, parse

_symbols: dict[str, str] = dict(DEFAULT_SYMBOLS)


def register_symbol(symbol: str, description: str) -> None:
    """Make `symbol` legal in patterns. Registering the same symbol with another description is a `ConfigError`."""
    check_symbol(symbol)
    if _symbols.setdefault(symbol, description) != description:
        raise ConfigError(f"the symbol {symbol!r} already stands for {_symbols[symbol]}")


def parse_pattern(text: str) -> Pattern:
    """Parse with all registered symbols. Raises `PatternError`."""
    return parse(text, _symbols)
