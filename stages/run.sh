# Run a stage: `sh stages/run.sh stages/STAGE.py [WORD]...`, in the folder of dvc.yaml.
#
# Python is the one that runs the dvc above this process, so that `.venv/bin/dvc repro` works without activation;
# else the one of the shell, else the one of the clone. PYTHONPATH: the code beside dvc.yaml runs, also in
# `dvc exp run --temp`. -P: Python does not import a script of stages/ in place of a library of the same name (pandas
# imports `bottleneck`). Other settings of Python are not taken from the shell: they could change or end a stage.

for name in $(env | sed -n 's/^\(PYTHON[A-Z0-9_]*\)=.*/\1/p'); do
    unset "$name"
done
first_word() {
    [ ! -r "/proc/$1/cmdline" ] || tr '\0' '\n' <"/proc/$1/cmdline" | head -n 1
}
above=$(first_word "$PPID")
case ${above##*/} in
python*) ;;
*) above=$(first_word "$(sed -n 's/^PPid:[^0-9]*//p' "/proc/$PPID/status" 2>/dev/null)") ;; # beyond DVC's shell
esac
for python in "$above" python "${DVC_ROOT:-.}/.venv/bin/python"; do
    case ${python##*/} in
    python*) ;;
    *) continue ;;
    esac
    if "$python" -P -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("pydantic"))' 2>/dev/null; then
        export PYTHONPATH=src PYTHONUTF8=1
        exec "$python" -P "$@"
    fi
done
echo "No Python with the packages of this repository was found: \`make venv\` makes one in .venv." >&2
exit 1
