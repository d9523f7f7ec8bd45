# SPDX-License-Identifier: Apache-2.0
# Sourced by ./dev and by the other scripts here: speech, stamps, the machine's mirror.
# shellcheck shell=bash

build=$repository/.build
logs=$build/log
stamps=$build/stamps
mkdir -p "$logs" "$stamps"
export PATH=$PATH:/usr/sbin:/sbin

say() { printf 'dev: %s\n' "$*" >&2; }
die() {
    printf 'dev: ERROR: %s\n' "$*" >&2
    exit 1
}

# logged NAME COMMAND…: run it with its output in .build/log/NAME.log; show that on failure.
logged() {
    local log=$logs/$1.log
    shift
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 40 "$log" >&2
        die "failed: $* (all of it in $log)"
    fi
}

# digest WORD… : one hash over the named files and words.
digest() {
    local word
    for word; do
        if [ -f "$word" ]; then sha256sum <"$word"; else printf '%s\n' "$word"; fi
    done | sha256sum | cut -d' ' -f1
}
# A step is skipped while the stamp of its inputs stands.
is_fresh() { [ "$(cat "$stamps/$1" 2>/dev/null)" = "$2" ]; }
stamp() { printf '%s\n' "$2" >"$stamps/$1"; }

read_release() {
    [ -r /etc/os-release ] || die "no /etc/os-release: Debian 12 or 13 is needed"
    release_id=$(. /etc/os-release && echo "${ID:-}")
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
}

# Who may install: this user, sudo without a question, or nobody.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}
can_be_root() { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }

# apt_sources: the machine's own binary sources, one line each:
#   URI <tab> suite <tab> components <tab> signed-by <tab> trusted
# from one-line files and deb822 files alike. A key written inside a deb822 file comes
# with its newlines as \x01.
apt_sources() {
    local parts=/etc/apt/sources.list.d files=() file
    for file in /etc/apt/sources.list "$parts"/*.list; do
        [ -r "$file" ] && files+=("$file")
    done
    if [ ${#files[@]} -gt 0 ]; then
        awk '
        { sub(/#.*/, "") }
        $1 != "deb" { next }
        {
            options = ""
            if (match($0, /\[[^]]*\]/)) {
                options = substr($0, RSTART + 1, RLENGTH - 2)
                $0 = substr($0, 1, RSTART - 1) substr($0, RSTART + RLENGTH)
            }
            signed = trusted = ""
            n = split(options, option, " ")
            for (i = 1; i <= n; i++) {
                if (option[i] ~ /^signed-by=/) signed = substr(option[i], 11)
                if (option[i] ~ /^trusted=/) trusted = substr(option[i], 9)
            }
            components = ""
            for (i = 4; i <= NF; i++) components = components (i > 4 ? " " : "") $i
            printf "%s\t%s\t%s\t%s\t%s\n", $2, $3, components, signed, trusted
        }' "${files[@]}"
    fi
    files=()
    for file in "$parts"/*.sources; do
        [ -r "$file" ] && files+=("$file")
    done
    [ ${#files[@]} -gt 0 ] || return 0
    awk '
    function flush(    i, j, n, m, uri, suite) {
        if (field["types"] ~ /(^| )deb( |$)/ && field["enabled"] !~ /^(no|false|0)$/) {
            n = split(field["uris"], uri, " ")
            m = split(field["suites"], suite, " ")
            for (i = 1; i <= n; i++)
                for (j = 1; j <= m; j++)
                    printf "%s\t%s\t%s\t%s\t%s\n", uri[i], suite[j],
                        field["components"], field["signed-by"], field["trusted"]
        }
        delete field
        key = ""
    }
    FNR == 1 { flush() }
    /^#/ { next }
    /^[ \t]*$/ { flush(); next }
    /^[ \t]/ {
        if (key == "signed-by") field[key] = field[key] "\001" $0
        else if (key != "") { gsub(/^[ \t]+/, ""); field[key] = field[key] " " $0 }
        next
    }
    {
        colon = index($0, ":")
        key = tolower(substr($0, 1, colon - 1))
        value = substr($0, colon + 1)
        gsub(/^[ \t]+|[ \t]+$/, "", value)
        field[key] = value
    }
    END { flush() }' "${files[@]}"
}

# write_source SUITE >FILE: a deb822 source for SUITE on the mirror this machine uses
# for its main archive.
write_source() {
    local line uri components signed trusted
    line=$(apt_sources | awk -F'\t' -v want="$codename" '
        $3 ~ /(^| )main( |$)/ && $1 !~ /security/ {
            if ($2 == want) { print; found = 1; exit }
            if ($2 ~ /^(stable|oldstable)$/ && other == "") other = $0
        }
        END { if (!found && other != "") print other }')
    [ -n "$line" ] || die "no apt source for $codename main found on this machine"
    # Not with read: a tab is white space to it, and empty fields would vanish.
    uri=$(cut -f1 <<<"$line")
    components=main
    signed=$(cut -f4 <<<"$line")
    trusted=$(cut -f5 <<<"$line")
    echo "# Written by ./dev of pveplug."
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: %s\n' "$uri" "$1" "$components"
    [ -z "$signed" ] || printf 'Signed-By: %s\n' "$signed" | tr '\001' '\n'
    [ -z "$trusted" ] || printf 'Trusted: %s\n' "$trusted"
}
