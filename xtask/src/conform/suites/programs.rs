//! Programs of our own, one for each way of managing a heap: they fill it, churn it, check it, and
//! print a digest of each thing that they computed.

use std::process::Command;
use std::time::Duration;

use super::{Cache, Case, Ended, Prepared, Verdicts, own, run, said, verdict_lines, version_of};

const PATIENCE: Duration = Duration::from_secs(900);

pub(super) fn go(cache: &Cache) -> anyhow::Result<Prepared> {
    cache.packages(&["golang-go", "gcc", "libc6-dev"])?;
    let program = cache.folder.join("heap-go");
    // A program that Go links by itself is static, loads no library, and runs unpaged.
    let build = ["build", "-ldflags=-linkmode=external", "-o"];
    run(Command::new("go")
        .args(build)
        .arg(&program)
        .arg(own("heap.go"))
        .env("GOCACHE", cache.folder.join("go"))
        .env("GOPATH", cache.folder.join("go")))?;
    let version = said(Command::new("go").arg("version"))?;
    let case = |name, settings: &[&str]| {
        let program = program.display().to_string();
        let command = ["env"].iter().chain(settings).map(|word| (*word).to_owned());
        Case::new(name, command.chain([program]), PATIENCE, printed)
    };
    let cases = vec![
        case("go", &["GOGC=40"]),
        case("go, madvise(MADV_FREE)", &["GODEBUG=madvdontneed=0"]),
        case("go, stack and pointer checks", &["GODEBUG=gcshrinkstackoff=1,clobberfree=1"]),
    ];
    Ok((format!("a program of our own, {}, linked dynamically", version.trim()), cases))
}

pub(super) fn java(cache: &Cache) -> anyhow::Result<Prepared> {
    cache.packages(&["openjdk-17-jdk-headless"])?;
    let classes = cache.folder.display().to_string();
    run(Command::new("javac").args(["-d", &classes]).arg(own("Heap.java")))?;
    let collectors = ["Serial", "Parallel", "G1", "Shenandoah", "Z"].map(|collector| {
        let collector_option = format!("-XX:+Use{collector}GC");
        let command = ["java", "-Xmx384m", &collector_option, "-cp", &classes, "Heap"];
        Case::new(format!("java, {collector} collector"), command, PATIENCE, printed)
    });
    let version = version_of("openjdk-17-jdk-headless")?;
    Ok((format!("a program of our own, OpenJDK {version}, five collectors"), collectors.into()))
}

pub(super) fn node(cache: &Cache) -> anyhow::Result<Prepared> {
    cache.packages(&["nodejs"])?;
    let case = |name, options: &[&str]| {
        let script = own("heap.js");
        let command = ["node"].iter().chain(options).map(|word| (*word).to_owned());
        Case::new(name, command.chain([script]), PATIENCE, printed)
    };
    let cases = vec![case("node", &[]), case("node, interpreter only", &["--jitless"])];
    let version = said(Command::new("node").arg("--version"))?;
    Ok((format!("a program of our own, node {}", version.trim()), cases))
}

pub(super) fn luajit(cache: &Cache) -> anyhow::Result<Prepared> {
    cache.packages(&["luajit"])?;
    let case = |name, option: &str| {
        Case::new(name, ["luajit", option, &own("heap.lua")], PATIENCE, printed)
    };
    let cases = vec![case("luajit", "-jon"), case("luajit, interpreter only", "-joff")];
    Ok((format!("a program of our own, LuaJIT {}", version_of("luajit")?), cases))
}

/// A file full of templates, compiled to objects that must be the same byte by byte.
pub(super) fn gcc(cache: &Cache) -> anyhow::Result<Prepared> {
    cache.packages(&["g++", "libc6-dev"])?;
    let case = |name: &str, options: &[&str]| {
        let source = own("large.cc");
        let script = "g++ -std=c++17 \"$@\" -c -o large.o && sha256sum large.o | \
                      awk '{ print \"object\\t\" $1 }'";
        let command =
            ["sh", "-ec", script, "sh", &source].into_iter().chain(options.iter().copied());
        Case::new(format!("g++ {name}"), command, PATIENCE, printed)
    };
    let cases =
        vec![case("-O0 -g", &["-O0", "-g", "-DSTORES=16"]), case("-O2", &["-O2", "-DSTORES=6"])];
    Ok((format!("a file of templates, g++ {}", version_of("g++")?), cases))
}

pub(super) fn numpy(cache: &Cache) -> anyhow::Result<Prepared> {
    cache.packages(&["python3", "python3-numpy", "python3-pandas"])?;
    let command = ["/usr/bin/python3".to_owned(), own("frames.py")];
    let case = Case::new("numpy and pandas", command, PATIENCE, printed);
    let (numpy, pandas) = (version_of("python3-numpy")?, version_of("python3-pandas")?);
    Ok((format!("a script of our own, numpy {numpy}, pandas {pandas}"), vec![case]))
}

/// What the program printed: lines of a name, a tab, a digest.
fn printed(ended: &Ended) -> anyhow::Result<Verdicts> {
    verdict_lines(&ended.outcome.output)
}
