# Sourced by demo.sh and test.sh: makes .venv once for these requirements, and puts it on PATH.
#   setup_env [requirements file …]

setup_env() {
    local venv=.venv stamp wanted
    wanted=$(cat "$@" | cksum)
    stamp=$venv/.installed-$(printf '%s_' "$@" | tr -c 'a-z0-9\n' '_')
    if ! [ -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "Installing into $venv ($*) …"
        [ -x $venv/bin/python ] || python3 -m venv $venv || {
            rm -rf $venv
            echo "python3 -m venv failed: install your system's python3-venv package, then run this again" >&2
            return 1
        }
        # torch alone and first: installed together with the rest, another package may choose a newer build of it
        $venv/bin/python -m pip install -qq --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
        local file
        for file in "$@"; do
            $venv/bin/python -m pip install -qq --disable-pip-version-check -r "$file"
        done
        echo "$wanted" >"$stamp"
    fi
    export PATH="$PWD/$venv/bin:$PATH"
}
