"""YAML that people write and share: plain values, read within limits, so that no file or override can fill the memory."""

from pathlib import Path

import yaml

from offline_bkd.pipeline import UserError

BYTES = 2**20  # of a file
CHARACTERS = 4096  # of one value
VALUES = 20_000  # of a file, keys among them; one that an alias repeats counts each time
LEVELS = 50  # of sections within sections


def read_text(path: Path, limit: int = BYTES) -> str:
    """The UTF-8 text of the regular file `path`, of at most `limit` bytes; a byte-order mark is left out.

    Raises OSError where it cannot be opened, UserError where it is of another kind, larger, or no UTF-8.
    """
    if path.exists() and not path.is_file():  # a pipe or a device would be read for ever
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; name a file")
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} holds more than {limit:,} bytes; is it the right file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}: {error.reason}); save it as UTF-8")


def read_yaml(path: Path) -> dict:
    """The mapping in the file `path`. Raises OSError where it cannot be opened, UserError where it holds something else."""
    text = read_text(path)
    try:
        values = parse_yaml(text)
    except UserError as error:
        raise UserError(f"{path} is not plain YAML: {error}")
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping of keys to values; see configs/ for examples")
    return values


def parse_yaml(text: str):
    """The value that `text` is. Raises UserError, one line that says what is wrong and where."""
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.MarkedYAMLError as error:
        said, line = ", ".join(part for part in (error.context, error.problem) if part), error.problem_mark.line
        variable = "${" in text.splitlines()[line] if line < len(text.splitlines()) else False
        remedy = "; within braces, quote what holds ${…}" if variable else ""
        raise UserError(f"line {line + 1}: {said}{remedy}")
    except yaml.reader.ReaderError as error:
        raise UserError(error.reason)
    except ValueError as error:  # a number such as 0x_
        raise UserError(str(error))


class _PlainLoader(yaml.SafeLoader):
    """Refuses, before it makes a value of it: a key given twice, a tag, what is beyond the limits above."""

    def __init__(self, text: str):
        super().__init__(text)
        self.level = 0
        self.extents: dict[yaml.Node, tuple[int, int]] = {}  # (values, levels) in each that is read, aliases followed

    def compose_node(self, parent, index):
        event = self.peek_event()
        if getattr(event, "tag", None):
            self.refuse(event, "a tag (!…) is not read; write the value alone")
        if len(self.extents) == VALUES:
            self.refuse(event, f"more than {VALUES:,} values")
        if self.level == LEVELS:
            self.refuse(event, f"more than {LEVELS} levels of nesting")
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        if not isinstance(event, yaml.AliasEvent):
            self.extents[node] = self.measure(node, event)
        elif node not in self.extents:
            self.refuse(event, f"the alias *{event.anchor} lies within what it stands for")
        values, levels = self.extents[node]
        if values > VALUES:
            self.refuse(event, f"more than {VALUES:,} values, as aliases repeat them")
        if self.level + levels > LEVELS:
            self.refuse(event, f"more than {LEVELS} levels of nesting, aliases followed")
        return node

    def measure(self, node: yaml.Node, event: yaml.Event) -> tuple[int, int]:
        """How many values and levels `node` has, of which all parts are read."""
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > CHARACTERS:
                self.refuse(event, f"a value of more than {CHARACTERS:,} characters")
            if self.NON_PRINTABLE.search(node.value):  # by an escape, such as "\\0"
                self.refuse(event, "special characters are not allowed")
            return 1, 1
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(keys) > len(set(keys)):
                repeated = next(key for number, key in enumerate(keys) if key in keys[:number])
                self.refuse(event, f"the key {repeated!r} comes twice")
            parts = [part for pair in node.value for part in pair]
        extents = [self.extents[part] for part in parts]
        return 1 + sum(values for values, _ in extents), 1 + max((levels for _, levels in extents), default=0)

    def flatten_mapping(self, node: yaml.MappingNode):
        """Puts what `<<` merges in its place. Own keys count over merged ones, also where this is merged in turn."""
        super().flatten_mapping(node)
        pairs = {key.value if isinstance(key, yaml.ScalarNode) else key: (key, value) for key, value in node.value}
        node.value = list(pairs.values())

    def refuse(self, event: yaml.Event, problem: str):
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


# a date is a text: no key of ours is one, and names may look like it
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
