"""Random overrides that a user may type, from valid to senseless."""

import string

VALUES = (
    *("0", "-1", "1", "2", "7", "255", "2147483648", "1000000000000", "0.5", "-0.5", "1e-3", "1e30"),
    *("nan", "inf", "-inf", "true", "false", "null", "", "abc", "'a b'", "'ä, ö'", "???", "auto", "'1'"),
    *("../..", "/nonexistent", "/dev/null", "[]", "[1,2]", "[64,64]", "[a,b]", "[[1],{a:[2]}]"),
    *("{}", "{a:1}", "{transform:NoSuch}", "{weight:x}", "1,2", "a=b", "[1,", "{a", "'", "\\", "sort(2,1)"),
    *("${epochs}", "${nothing.here}", "${oc.env:NO_SUCH_NAME}", "${"),
)


def draw(random, keys, groups, options):
    """Draw an override from dotted keys, from groups (names of options by group), and from options to add with +."""
    kind = random.random()
    if kind > 0.85:
        return f"+{random.choice(options)}={random.choice(VALUES)}"
    kind /= 0.85
    if kind < 0.15:
        group = random.choice(sorted(groups))
        return f"{group}={random.choice([*groups[group], 'nosuch', random.choice(VALUES)])}"
    key = random.choice(keys)
    value = random.choice(VALUES)
    if kind < 0.7:
        return f"{key}={value}"
    if kind < 0.78:
        return f"~{key}"
    if kind < 0.86:
        return f"{misspelt(random, key)}={value}"
    if kind < 0.94:
        return f"{random.choice(['+', '++'])}{random.choice([key, f'{key}.x', misspelt(random, key)])}={value}"
    return "".join(random.choice(string.printable[:95]) for _ in range(random.randint(1, 12)))


def misspelt(random, key):
    place = random.randrange(len(key))
    return key[:place] + random.choice(["", random.choice(string.ascii_lowercase)]) + key[place + 1 :]
