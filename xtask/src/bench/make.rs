//! `cargo xtask bench make`: what farmem costs programs that fit, where there are thousands of them:
//! a parallel make of a C project, and a shell that starts one program after the other.
//!
//! Both run natively and under farmem in turn, native first; the figures are medians of the pairs.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use clap::Args;

use crate::build;
use crate::stage::{Outcome, Place, Program, Stage, Variant};

#[derive(Args)]
pub(crate) struct MakeOptions {
    /// Pairs of runs; the medians are over these.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// C files of the project, of 16 small functions each; seven processes are started for each.
    #[arg(long, default_value_t = 100)]
    files: usize,
    /// Programs that the shell starts one after the other.
    #[arg(long, default_value_t = 500)]
    programs: usize,
    /// A folder on a disk for the project.
    #[arg(long, default_value = "/var/tmp")]
    scratch: std::path::PathBuf,
}

/// More than all processes have together.
const LIMIT_BYTES: u64 = 2 << 30;

/// A make may take so much longer than natively; what is aimed at is less.
const RATIO_MAX: f64 = 1.05;
const RATIO_AIM: f64 = 1.02;

/// Functions in a file.
const FUNCTIONS: usize = 16;

#[expect(clippy::print_stdout, reason = "the figures are the result")]
pub(crate) fn make(options: &MakeOptions) -> anyhow::Result<()> {
    let runs = options.runs.max(1);
    let stage = Stage::prepare(build::with_workloads()?, &options.scratch, &[Variant::Unix])?;
    let shell = programs_in_turn(options.programs);
    let one = pairs(runs, |variant| stage.run(variant, LIMIT_BYTES, &shell))?;
    let each = |seconds: f64| seconds * 1e6 / options.programs as f64;
    println!(
        "a program that does nothing, {} in turn: natively {:.0} us, {:+.0} us under farmem; of \
         processor time {:.0} and {:+.0} us",
        options.programs,
        each(one.native_seconds),
        each(one.more_seconds),
        each(one.native_cpu_seconds),
        each(one.more_cpu_seconds),
    );

    let folder = stage.scratch("project");
    write_project(&folder, options.files)?;
    let project = compile(&folder);
    let made = pairs(runs, |variant| stage.run(variant, LIMIT_BYTES, &project))?;
    println!(
        "make -j2 of {} files: natively {:.2} s, {:.3} x under farmem (at most {RATIO_MAX}: {}; the aim \
         of {RATIO_AIM}: {}), processor time {:.3} x",
        options.files,
        made.native_seconds,
        made.ratio,
        verdict(made.ratio, RATIO_MAX),
        verdict(made.ratio, RATIO_AIM),
        1.0 + made.more_cpu_seconds / made.native_cpu_seconds,
    );
    ensure!(made.ratio <= RATIO_MAX, "a bar was missed");
    Ok(())
}

fn verdict(ratio: f64, most: f64) -> &'static str {
    if ratio <= most { "met" } else { "missed" }
}

/// Medians of pairs of runs.
struct Pairs {
    native_seconds: f64,
    native_cpu_seconds: f64,
    more_seconds: f64,
    more_cpu_seconds: f64,
    /// Of the time under farmem to the native time.
    ratio: f64,
}

fn pairs(runs: usize, run: impl Fn(Variant) -> anyhow::Result<Outcome>) -> anyhow::Result<Pairs> {
    // What both read comes from memory in every pair.
    run(Variant::Native)?;
    let pairs = (0..runs).map(|_| Ok((run(Variant::Native)?, run(Variant::Unix)?)));
    let pairs = pairs.collect::<anyhow::Result<Vec<_>>>()?;
    let of = |figure: fn(&(Outcome, Outcome)) -> f64| median(pairs.iter().map(figure).collect());
    Ok(Pairs {
        native_seconds: of(|(native, _)| native.wall_seconds),
        native_cpu_seconds: of(|(native, _)| native.cpu_seconds),
        more_seconds: of(|(native, paged)| paged.wall_seconds - native.wall_seconds),
        more_cpu_seconds: of(|(native, paged)| paged.cpu_seconds - native.cpu_seconds),
        ratio: of(|(native, paged)| paged.wall_seconds / native.wall_seconds),
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A shell that starts one program after the other and nothing else.
fn programs_in_turn(count: usize) -> Program {
    let script = format!("i=0; while [ $i -lt {count} ]; do /bin/true; i=$((i+1)); done");
    Program::new("sh", ["sh".to_owned(), "-c".to_owned(), script])
}

/// As makefiles of many projects do it: a folder is made if need be, the object is written beside its
/// place and moved there.
const MAKEFILE: &str = "\
objects := $(patsubst %.c,objects/%.o,$(wildcard *.c))
all: $(objects)
objects/%.o: %.c
\t@mkdir -p objects && gcc -O1 -c -o $@.new $< && mv $@.new $@
clean:
\t@rm -rf objects
";

fn write_project(folder: &Path, files: usize) -> anyhow::Result<()> {
    fs::create_dir(folder).with_context(|| format!("make {}", folder.display()))?;
    fs::write(folder.join("Makefile"), MAKEFILE).context("write the makefile")?;
    for file in 0..files {
        let functions = (0..FUNCTIONS).map(|number| {
            format!(
                "int f{file}_{number}(const int *values, int count) {{\n    int sum = {number};\n    \
                 for (int i = 0; i < count; i++) sum = sum * 31 + values[i];\n    return sum;\n}}\n"
            )
        });
        let path = folder.join(format!("part{file}.c"));
        fs::write(path, functions.collect::<String>()).context("write a C file")?;
    }
    Ok(())
}

fn compile(folder: &Path) -> Program {
    let script = "make -s clean && make -s -j2 all".to_owned();
    let mut program = Program::new("make", ["sh".to_owned(), "-c".to_owned(), script]);
    let environment = vec![("PATH", "/usr/bin:/bin".to_owned())];
    program.place = Some(Place { folder: folder.to_owned(), environment });
    program
}
