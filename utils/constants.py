"""The constants at the top of a script, and the command line that overrides them."""
import argparse
import ast
import difflib
import math
import re
from pathlib import Path
from types import SimpleNamespace

from utils.errors import UserError

RULER = '\n# ' + '-' * 20  # or longer


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
    **one_of('precision', 'auto', 'bf16', 'fp32')}


def read_constants(module, argv, rules):
    """The constants of a script, of which `module` is the globals(), those named in `argv` replaced, as a SimpleNamespace.

    Its constants are what is assigned above the first ruler, `# ----...`. `argv` holds `--name value` or `--name=value`;
    `--help` prints every constant with its comment and exits.

    `rules` maps a name to (types, is_valid, wanted), as in
    `'lr': (float, lambda v: 0 < v < 1, 'a learning rate between 0 and 1')`. `types` is one type or a tuple:
    with (int, str) a text is a whole number if it looks like one. Script and rules must name the same things. Raises
    UserError for the first mistake found.
    """
    script = Path(module['__file__'])
    above, ruler, _ = script.read_text('utf-8').partition(RULER)
    if not ruler:
        raise UserError(f'{script.name}: the line "{RULER.strip()}" below the constants is missing; put it back')
    # an indented comment line carries on the comment above it
    comments = dict(re.findall(r'^(\w+)[ \t]*(?::[^=\n]+)?=(?!=)(?:.*?[ \t]# (.*(?:\n +# .*)*))?', above, re.M))
    for name in [*rules, *comments]:
        if name not in comments:
            raise UserError(f'{script.name}: the constant {name!r} is missing; put it back above the ruler')
        if name not in rules:
            near = _nearest(name, rules)
            remedy = near if near.startswith('did') else 'delete its line'
            raise UserError(f'{script.name}: there is no constant {name!r}; {remedy}')
    given = _read_command_line(argv, module, comments)
    values = {}
    for name in comments:
        types, is_valid, wanted = rules[name]
        types = types if isinstance(types, tuple) else (types,)
        found = given.get(name, module[name])
        try:
            values[name] = _from_text(found, types) if name in given else _as_type(found, types)
            valid = is_valid(values[name])
        except (ValueError, TypeError):  # also a rule that meets a row it cannot unpack or measure
            valid = False
        if not valid:
            raise UserError(f'{f"--{name}" if name in given else script.name}: {name} is {found!r}, but must be {wanted}')
    return SimpleNamespace(**values)


def _read_command_line(argv, module, comments):
    """The texts given for constants, by name."""
    parser = argparse.ArgumentParser(
        description=module['__doc__'], usage='%(prog)s [--name value ...]', allow_abbrev=False, exit_on_error=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32))
    group = parser.add_argument_group('constants, with their values in the script')
    for name, comment in comments.items():
        group.add_argument(f'--{name}', metavar=repr(module[name]), default=argparse.SUPPRESS,
                           help=re.sub(r'\n +# *', ' ', comment).replace('%', '%%'))
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f'{error.argument_name} needs a value') from None
    if rest and rest[0].startswith('--'):
        name = rest[0][2:].split('=')[0]
        raise UserError(f'there is no constant {name!r}; {_nearest(name, comments)}')
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
    word = word.capitalize() if word.lower() in ('true', 'false') else word
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
            return kind(value)
    raise ValueError(value)
