# Debian packages that tests or engines want, where we may install them. To be sourced, with LOG set.

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# apt PACKAGE...: installs the first of them that there is. Fails quietly where this is not Debian or we may not.
apt() {
    local package try
    command -v apt-get >/dev/null || return 1
    [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null || return 1
    for try in as-it-is updated; do
        [ $try = as-it-is ] || as_root apt-get update -q >>"$LOG" 2>&1 || return 1
        for package in "$@"; do
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$package" \
                >>"$LOG" 2>&1 </dev/null && return 0
        done
    done
    return 1
}
