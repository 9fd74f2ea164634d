//! Programs do not notice the watcher, and it ends when it should.

use std::io::Read;
use std::process::Stdio;

use crate::harness::{Run, artefacts, await_that, is_alive, reap_companions, specimen};

/// No program of these tests comes near it.
const AMPLE_MIB: u64 = 64 << 10;

#[test]
fn a_program_sees_no_child_no_thread_no_descriptor_and_no_signal() {
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    let native = std::process::Command::new(specimen()).arg("look").output().unwrap().stdout;
    let native = String::from_utf8(native).unwrap();
    assert!(native.starts_with("wait -1 Some(10)\ntasks 1\n"), "{native}");
    assert_eq!(run.output(&mut run.specimen(&["look"])), native);
}

#[test]
fn a_watcher_is_there_and_ends_with_the_program() {
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    let mut program = run.command("sleep").arg("60").spawn().unwrap();
    run.await_companions(1);
    program.kill().unwrap();
    program.wait().unwrap();
    run.await_companions(0);
}

/// Where a program fills its memory on a busy machine, a watcher of ordinary priority would come long
/// after the limit: it asks for short turns, which come soon.
#[test]
fn a_watcher_without_real_time_priority_asks_for_short_turns() {
    use std::os::unix::process::CommandExt;
    const CAP_SYS_NICE: libc::c_ulong = 23;
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    let mut command = run.command("sleep");
    let give_up_priority = || {
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: these calls read one structure, and change what this process may do.
        unsafe {
            libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_NICE, 0, 0, 0);
            libc::setrlimit(libc::RLIMIT_RTPRIO, &raw const none);
        }
        Ok(())
    };
    // SAFETY: the closure makes two system calls and takes no lock.
    unsafe { command.pre_exec(give_up_priority) };
    let mut program = command.arg("60").spawn().unwrap();
    run.await_companions(1);
    let watcher = run.companions()[0];
    // The words of the kernel's sched_attr: size and policy, flags, nice and priority, runtime, and two
    // more.
    let mut words = [0u64; 6];
    let mut ask = || {
        // SAFETY: sched_getattr(2) writes at most the 48 bytes that it is told of.
        let done =
            unsafe { libc::syscall(libc::SYS_sched_getattr, watcher, words.as_mut_ptr(), 48, 0) };
        assert_eq!(done, 0);
        (words[0] >> 32, words[3])
    };
    // A kernel before 6.12 has none to tell.
    let knows_turns = ask().1 != 0;
    await_that("short turns", || !knows_turns || ask() == (0, 100_000));
    program.kill().unwrap();
    program.wait().unwrap();
    run.await_companions(0);
}

#[test]
fn pipes_reach_their_end_while_a_watcher_lives() {
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    let script = "exec sleep 60 >&- 2>&- <&-";
    let mut program =
        run.command("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    run.await_companions(1);
    let mut output = String::new();
    program.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(output, "");
    assert!(program.try_wait().unwrap().is_none(), "the end of the pipe is not the program's end");
    run.await_companions(1);
    program.kill().unwrap();
    program.wait().unwrap();
}

#[test]
fn pipelines_of_a_shell_work() {
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    let script = "seq 1 1000 | sort -n | tail -n 1; (echo a; echo b) | wc -l; /bin/true && echo $?";
    assert_eq!(run.output(run.command("sh").args(["-c", script])), "1000\n2\n0\n");
    run.await_companions(0);
}

#[test]
fn two_hundred_short_children_are_each_waited_for_once() {
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    assert_eq!(run.output(&mut run.specimen(&["forks", "200"])), "forked 200 rest -1\n");
    run.await_companions(0);
}

#[test]
fn images_that_exec_has_replaced_do_not_pile_up() {
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    let mut program = run.specimen(&["exec-loop", "300"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut most = 0;
    while program.try_wait().unwrap().is_none() {
        most = most.max(run.companions().len());
        reap_companions();
    }
    let mut output = String::new();
    program.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(output, format!("done {}\n", 8 << 20));
    eprintln!("watchers at once over 300 execs: {most}");
    assert!(most <= 16, "{most} watchers kept an old image each");
    run.await_companions(0);
}

#[test]
fn a_stopped_program_keeps_its_watcher_and_goes_on() {
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    let mut program = run.command("sleep").arg("60").spawn().unwrap();
    run.await_companions(1);
    let id = program.id().cast_signed();
    // SAFETY: signals a child of this test that has not been waited for.
    unsafe { libc::kill(id, libc::SIGSTOP) };
    let state = |process: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
    };
    await_that("the program to stop", || state(id) == 'T');
    assert!(run.companions().iter().all(|&watcher| state(watcher) != 'T'));
    // SAFETY: as above.
    unsafe { libc::kill(id, libc::SIGCONT) };
    await_that("the program to go on", || state(id) == 'S');
    run.await_companions(1);
    program.kill().unwrap();
    program.wait().unwrap();
}

#[test]
fn the_program_dies_with_its_supervisor() {
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    let name = format!("farmem-test-supervisor-{}", std::process::id());
    let mut supervisor = run
        .specimen(&["supervise", &name, "sleep", "60"])
        .env_remove("LD_PRELOAD")
        .env("LD_PRELOAD_LATER", &artefacts().unwrap().preload)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut output = std::io::BufReader::new(supervisor.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut output, &mut line).unwrap();
    let program: i32 = line.trim().parse().unwrap();
    let watcher = || {
        let mut processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        processes.any(|process| {
            let read = |file| std::fs::read(process.path().join(file)).unwrap_or_default();
            let environment = String::from_utf8_lossy(&read("environ")).into_owned();
            read("comm").starts_with(b"farmem-") && environment.contains(&name)
        })
    };
    await_that("the watcher", watcher);
    assert!(is_alive(program));
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    await_that("the program to be killed", || !is_alive(program));
}

#[test]
fn the_program_outlives_a_subreaper_below_the_supervisor() {
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    let script = "sleep 0.5; echo alive";
    assert_eq!(run.output(&mut run.specimen(&["subreaper", "sh", "-c", script])), "alive\n");
    run.await_companions(0);
}

#[test]
fn a_program_goes_on_where_the_supervisor_cannot_be_reached() {
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root may make namespaces");
        return;
    }
    // The shell is the first process of its container, and so the parent of its child's watcher.
    let script = "sh -c 'sleep 0.5; echo alive'; true";
    let mut container = run.command("unshare");
    container.args(["--net", "--pid", "--fork", "sh", "-c", script]);
    assert_eq!(run.output(&mut container), "alive\n");
    run.await_companions(0);
}

#[test]
fn a_malformed_variable_is_one_line_and_no_variable_is_none() {
    let Some(run) = Run::new(AMPLE_MIB) else {
        return;
    };
    let silent = run.command("true").env_remove("FARMEM_RUN").output().unwrap();
    assert!(silent.status.success() && silent.stderr.is_empty());
    for (value, fault) in [
        ("v2:a:1:/p", "begin with v1:"),
        ("v1::1:/p", "no socket name"),
        ("v1:a:x:/p", "not a number"),
        ("v1:a:1", "no path"),
        ("v1:a:1:p", "does not begin with /"),
    ] {
        let loud = run.command("true").env("FARMEM_RUN", value).output().unwrap();
        let stderr = String::from_utf8(loud.stderr).unwrap();
        assert!(loud.status.success(), "{value}");
        assert!(stderr.lines().count() == 1 && stderr.contains(fault), "{value}: {stderr}");
    }
}
