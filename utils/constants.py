"""The constants at the top of a script, and the command line that overrides them."""
import argparse
import ast
import difflib
import io
import math
import tokenize
from pathlib import Path
from types import NoneType, SimpleNamespace

from utils.errors import UserError
from utils.files import write_whole

RULER = '# ' + '-' * 20  # or longer
KINDS = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a text', NoneType: 'none',
         tuple: 'a tuple such as (1, 2)', list: 'a list such as [1, 2]'}


def rule(names, kind, is_valid, wanted):
    """One rule for each of the names in a text."""
    return dict.fromkeys(names.split(), (kind, is_valid, wanted))


def one_of(names, *words):
    return rule(names, str, lambda v: v in words, ' or '.join(map(repr, words)))


SHARED_RULES = {  # of train.py and test.py
    **rule('data_dir run cache_dir device', str, bool, 'a text in quotes'),
    **rule('skip_bad_images', bool, lambda v: True, 'True or False'),
    **rule('threads', int, lambda v: v >= 0, 'a whole number, 0 or more'),
    **one_of('cache', 'auto', 'device', 'memory', 'disk', 'none'),
    **one_of('precision', 'auto', 'bf16', 'fp32'), **one_of('compile', 'auto', 'yes', 'no')}


def read_constants(script_path, argv, rules):
    """The constants of the script at `script_path`, those named in `argv` replaced, as a SimpleNamespace.

    The script is read, never run: its constants are the plain assignments above the first ruler, `# ----...`.
    `argv` holds `--name value` or `--name=value`; `--help` prints every constant with its comment and exits.

    `rules` maps a name to (types, is_valid or None, wanted or None), as in
    `'lr': (float, lambda v: 0 < v < 1, 'a learning rate between 0 and 1')`. `types` is one type or a tuple:
    with (int, str) a text is a whole number if it looks like one. Script and rules must name the same things. Raises
    UserError for the first mistake found.
    """
    script = Path(script_path).name
    doc, constants = _parse(script_path)
    for name in rules:
        if name not in constants:
            raise UserError(f'{script}: the constant {name!r} is missing; put it back above the ruler')
    given = _read_command_line(argv, doc, constants)
    values = {}
    for name, constant in constants.items():
        where = f'--{name}' if name in given else f'{script}, line {constant.line}'
        if name not in rules:
            raise UserError(f'{where}: there is no constant {name!r}; {_nearest(name, rules)}')
        types, is_valid, wanted = rules[name]
        types = types if isinstance(types, tuple) else (types,)
        wanted = wanted or ' or '.join(KINDS[kind] for kind in types)
        found = given.get(name, constant.value)
        try:
            values[name] = _from_text(found, types) if name in given else _as_type(found, types)
            valid = is_valid is None or is_valid(values[name])
        except (ValueError, TypeError):  # also a rule that meets a row it cannot unpack or measure
            valid = False
        if not valid:
            raise UserError(f'{where}: {name} is {found!r}, but must be {wanted}')
    return SimpleNamespace(**values)


def write_constants(constants, path):
    """Write the namespace as a file of `name = value` lines."""
    text = ''.join(f'{name} = {value!r}\n' for name, value in vars(constants).items())
    write_whole(path, lambda temporary: Path(temporary).write_text(text, encoding='utf-8'))


def _parse(script_path):
    """The script's docstring; by name the value, line and comment of each assignment above the ruler."""
    script = Path(script_path).name
    source = Path(script_path).read_text(encoding='utf-8')
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comment_at = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    ruler = next((row for row, token in comment_at.items() if token.line.startswith(RULER)), None)
    if ruler is None:
        raise UserError(f'{script}: the line "{RULER}" below the constants is missing; put it back')
    module = ast.parse(source)
    constants = {}
    for node in (node for node in module.body if node.lineno < ruler):
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)):
            continue
        try:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)]):
                    value = ast.literal_eval(node.value)
                case _:
                    raise ValueError
        except ValueError:
            raise UserError(f'{script}, line {node.lineno}: above the ruler, write only `name = value`, '
                            'without formulas') from None
        last = node.end_lineno
        while last + 1 in comment_at and comment_at[last + 1].line.startswith(' '):
            last += 1  # an indented comment line carries on the comment above it
        rows = [row for row in range(node.lineno, last + 1) if row in comment_at]
        comment = ' '.join(comment_at[row].string.lstrip('# ') for row in rows)
        constants[name] = SimpleNamespace(value=value, line=node.lineno, comment=comment)
    return ast.get_docstring(module), constants


def _read_command_line(argv, doc, constants):
    """The texts given for constants, by name."""
    parser = argparse.ArgumentParser(
        description=doc, usage='%(prog)s [--name value ...]', allow_abbrev=False, exit_on_error=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32))
    group = parser.add_argument_group('constants, with their values in the script')
    for name, constant in constants.items():
        group.add_argument(f'--{name}', metavar=repr(constant.value), default=argparse.SUPPRESS,
                           help=constant.comment.replace('%', '%%'))
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f'{error.argument_name} needs a value') from None
    if rest and rest[0].startswith('--'):
        name = rest[0][2:].split('=')[0]
        raise UserError(f'there is no constant {name!r}; {_nearest(name, constants)}')
    if rest:
        raise UserError(f'{rest[0]!r} belongs to no constant; write --name value')
    return vars(given)


def _nearest(name, names):
    folded = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower().replace('-', '_'), folded, n=1)
    return f'did you mean {folded[near[0]]!r}?' if near else 'see --help for the names'


def _from_text(text, types):
    """A text that reads as a value of one of `types` is that value; else it stays a text, if that may be."""
    word = text.strip()
    word = word.capitalize() if word.lower() in ('true', 'false', 'none') else word
    try:
        return _as_type(ast.literal_eval(word), [kind for kind in types if kind is not str])
    except (ValueError, TypeError, SyntaxError):
        if str in types:
            return text
        raise ValueError(text) from None


def _as_type(value, types):
    """`value` as one of `types`; a whole number does for a number, a list for a tuple and the reverse."""
    also = {int: float, list: tuple, tuple: list}.get(type(value), type(value))
    for kind in (type(value), also):
        if kind in types and not (kind is float and not math.isfinite(value)):
            return value if kind is NoneType else kind(value)
    raise ValueError(value)
