//! One dangerous thing each, done by a program whose memory is mostly out.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Signal, kill_process};

use crate::rig::{LIMIT, Rig, pid_of, skipped, trap};

/// R1: a child has what the parent had at the fork, whatever either of them writes afterwards.
#[test]
fn u3_a_child_has_the_memory_of_the_fork() {
    trap("fork_snapshots");
}

/// R1: so have its children and theirs.
#[test]
fn u3_three_generations_have_the_memory_of_their_forks() {
    trap("fork_nested");
}

/// R1: the memory of a fork is that of one instant, however fast the parent writes and evicts.
#[test]
fn u32_a_fork_is_one_instant() {
    let Some(rig) = Rig::new() else { return };
    let outcome = rig.run(&["--local", LIMIT], &rig.compile("fork_many"), &[]);
    outcome.is_right();
    // Children that live for a moment are nothing to report.
    assert_eq!(outcome.stderr, "", "{outcome:?}");
}

/// R1: so soon that the pager has not come back from reading of the removal.
#[test]
fn u3_what_was_dropped_before_a_fork_is_zero_in_the_child() {
    trap("drop_and_fork");
}

/// Where the pager has no descriptor left for one more child, the fork waits until others have ended.
#[test]
fn u3_more_children_than_descriptors() {
    trap("fork_short");
}

/// A thread is brought to the pager's processor for a moment, and only if it may run there.
#[test]
fn a_thread_stays_where_it_has_chosen_to_run() {
    trap("own_processors");
}

/// R1: so it is of each of a thousand forks in a row.
#[test]
fn u3_a_thousand_forks_in_a_row() {
    let Some(rig) = Rig::new() else { return };
    let program = rig.compile("fork_thousand");
    let mut running = rig.start(&["--local", LIMIT], &program, &[]);
    let outcome = running.end(Duration::from_secs(400));
    outcome.is_right();
    assert!(outcome.stats["fork_events"].as_u64() == Some(1000), "{outcome:?}");
}

/// R1: beside threads that bring in what is out, and write.
#[test]
fn u32_a_fork_beside_threads_that_fault_and_write() {
    trap("fork_threads");
}

/// R1: a child that the C library knows nothing of has no pager of its own; its parent's serves it.
#[test]
fn u3_forks_by_raw_system_calls_are_served() {
    let Some(rig) = Rig::new() else { return };
    let mut running = rig.start(&["--local", LIMIT], &rig.compile("fork_raw"), &[]);
    let outcome = running.end(Duration::from_secs(300));
    outcome.is_right();
    assert!(outcome.stats["fork_events"].as_u64() >= Some(2), "{outcome:?}");
}

/// R1: what a parent had out is still there for its child when the parent has ended.
#[test]
fn u3_an_orphan_keeps_what_it_inherited() {
    left_behind("fork_orphan", "the orphan found everything");
}

/// R1: a daemon is such a child, and closes its streams.
#[test]
fn u3_a_daemon_keeps_what_it_inherited() {
    left_behind("fork_daemon", "the daemon found everything");
}

/// R1: whoever borrows the memory finds it as it was, whatever becomes of the program.
#[test]
fn a_child_that_borrows_the_memory_outlives_its_parent() {
    let Some(rig) = Rig::new() else { return };
    let program = rig.compile("vfork_outlives");
    for (way, status) in [("exit", Some(0)), ("exec", Some(0)), ("kill", None)] {
        let outcome = rig.run(&["--local", LIMIT], &program, &[way]);
        assert_eq!(outcome.status.code(), status, "{way}: {outcome:?}");
        assert!(outcome.stdout.contains("the child found everything"), "{way}: {outcome:?}");
        assert_eq!(outcome.stderr, "", "{way}");
        outcome.has_paged();
    }
}

/// The status is that of the parent, so the child says itself how it went.
fn left_behind(name: &str, verdict: &str) {
    if let Some(rig) = Rig::new() {
        let outcome = rig.run(&["--local", LIMIT], &rig.compile(name), &[]);
        outcome.is_right();
        assert!(outcome.stdout.contains(verdict), "{outcome:?}");
    }
}

/// R1: forks that the kernel refuses midway leave nothing wrong, and those between are right.
#[test]
fn u4_refused_forks_harm_nothing() {
    trap("fork_refused");
}

/// R6: threads that change mappings without a pause do not keep others waiting for ever.
#[test]
fn u8_threads_that_only_give_pages_back_let_others_go_on() {
    trap("madvise_storm");
}

/// R6: the pager needs no lock of the program's C library, though it shares its memory.
#[test]
fn u15_locks_of_the_c_library_are_held_while_pages_come_in() {
    trap("library_locks");
}

/// R6: children that borrow the memory until their exec neither hang nor harm.
#[test]
fn u3_spawned_children_run() {
    trap("children");
}

/// R1: contents move with mremap.
#[test]
fn u5_a_block_that_grows_and_shrinks_keeps_its_content() {
    trap("grow_and_shrink");
}

/// R1: dropped pages read as zero, not as what they were on the server.
#[test]
fn u6_dropped_pages_read_as_zero() {
    trap("dontneed");
}

/// R1: a page that may be dropped and is written instead keeps what was written.
#[test]
fn u37_pages_written_after_madv_free_keep_it() {
    trap("madvise_free");
}

/// R1: guards drop pages without an event, and a copy would replace them.
#[test]
fn guards_stay_and_what_was_behind_them_is_gone() {
    let Some(rig) = Rig::new() else { return };
    let outcome = rig.run(&["--local", LIMIT], &rig.compile("guards"), &[]);
    if outcome.status.code() == Some(77) {
        skipped::<()>("the kernel has no MADV_GUARD_INSTALL (Linux 6.13)");
        return;
    }
    outcome.is_right();
}

/// R1: what a disk puts into a page is not lost with the page's former frame.
#[test]
fn u12_direct_reads_reach_the_program() {
    let Some(rig) = Rig::new() else { return };
    // The temporary folder may be in memory, where there is no O_DIRECT; this one is on a disk.
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = disk.path().join("direct");
    let file = file.to_str().unwrap();
    let outcome = rig.run(&["--local", LIMIT], &rig.compile("direct_io"), &[file]);
    if outcome.status.code() == Some(77) {
        skipped::<()>("the target folder's file system has no O_DIRECT");
        return;
    }
    outcome.is_right();
}

/// R1: a page that lies in a pipe is one page with the program's.
#[test]
fn u12_spliced_pages_stay_one() {
    trap("splice");
}

/// R1: as direct reads, by io_uring into registered buffers, which stay pinned.
#[test]
fn u12_reads_into_registered_buffers_reach_the_program() {
    trap("registered_buffers");
}

/// R1: files, pipes, sockets and results of system calls, from and into pages that are out.
#[test]
fn u16_system_calls_read_and_write_pages_that_are_out() {
    trap("system_calls");
}

/// R6: threads that sleep in the kernel on a word that went out are found and woken.
#[test]
fn u24_futexes_work_on_pages_that_are_out() {
    trap("futexes");
}

/// Why pages that refuse to be moved are not protected, copied and dropped instead: a page that the kernel
/// has pinned is written in spite of its protection, and nobody is told. Fails where that has changed.
#[test]
fn u11_protection_does_not_hold_what_has_pinned_a_page() {
    let Some(rig) = Rig::new() else { return };
    let program = rig.compile("protected_pin");
    let output = Command::new(program).current_dir(rig.path("")).output().unwrap();
    if output.status.code() == Some(77) {
        skipped::<()>("no io_uring or no userfaultfd here");
        return;
    }
    assert!(output.status.success(), "{output:?}");
}

/// R1: another process reads the program's memory through the kernel.
#[test]
fn u12_another_process_reads_pages_that_are_out() {
    trap("read_by_another");
}

/// R6: a pthread_join ends although the thread's stack was out.
#[test]
fn u36_short_threads_are_joined() {
    trap("short_threads");
}

/// R6: so it does for threads that slept until everything of theirs was out.
#[test]
fn u36_threads_that_slept_wake_and_are_joined() {
    trap("sleeping_threads");
}

/// R1: signals that come in while the kernel waits for a page neither kill nor confuse.
#[test]
fn u18_a_timer_interrupts_system_calls_on_pages_that_are_out() {
    trap("timer_signals");
}

/// R1: the pager is not the program's, so it keeps its privileges.
#[test]
fn u30_a_program_changes_its_user() {
    trap("another_user");
}

/// R1: nor is it in the program's sandbox.
#[test]
fn u30_a_program_enters_a_sandbox() {
    trap("sandbox");
}

/// R1: nor under its limits.
#[test]
fn u30_a_program_limits_itself() {
    trap("resource_limits");
}

/// R1: its pager writes to no file of the program's.
#[test]
fn u30_a_child_whose_program_may_write_no_file_is_paged() {
    trap("file_limit");
}

/// R6: locked memory is there at once and stays, and unlocked goes out again.
#[test]
fn u22_locked_memory_stays() {
    trap("locked_stays");
}

/// R1: each piece of advice does what madvise(2) says, and nothing else.
#[test]
fn u22_advice_does_what_its_manual_page_says() {
    trap("hints");
}

/// R1: locked memory stays, the rest comes and goes.
#[test]
fn u22_locked_and_populated_memory_keeps_its_content() {
    trap("locked");
}

/// R6: the kernel walks over all memory, the pager's own among it, and comes back.
#[test]
fn u35_everything_can_be_locked() {
    trap("lock_everything");
}

/// R1: moving a page fails where its protection has changed.
#[test]
fn u34_protections_change_under_pressure() {
    trap("protections");
}

/// R1: the kernel writes a signal's frame onto a stack that is out.
#[test]
fn u17_signals_are_handled_on_stacks_that_are_out() {
    trap("signal_stacks");
}

/// R1: half of a huge page may be out.
#[test]
fn u21_huge_pages_keep_their_content() {
    trap("huge_pages");
}

/// R1: the last descriptor of the userfaultfd is not the program's to close.
#[test]
fn u1_a_program_closes_every_descriptor() {
    trap("close_everything");
}

/// R6: a robust lock is released though its owner died with memory out.
#[test]
fn u24_a_lock_of_a_killed_owner_is_released() {
    trap("robust_lock");
}

/// R1: an image that replaces another starts with memory of its own.
#[test]
fn u38_images_replace_each_other() {
    trap("exec_loop");
}

/// R1: a debugger stops the program, reads its memory, and lets it go on. What is out it cannot
/// read, as the kernel lets a debugger wait for no page: it is told so, and nothing wrong.
#[test]
fn u30_a_debugger_reads_nothing_wrong_and_the_program_goes_on() {
    let Some(rig) = Rig::new() else { return };
    if Command::new("gdb").arg("--version").output().is_err() {
        skipped::<()>("no gdb: apt-get install gdb");
        return;
    }
    let program = rig.compile("debugged");
    let mut running = rig.start(&["--local", LIMIT], &program, &[]);
    let said = running.says("filled");
    let [_, pid, memory] = said.split_ascii_whitespace().collect::<Vec<_>>()[..] else {
        panic!("{said}");
    };
    let memory: u64 = memory.parse().unwrap();
    let mut gdb = Command::new("gdb");
    gdb.args(["-q", "-nx", "-batch", "-p", pid]);
    for mib in 0..128 {
        gdb.args(["-ex", &format!("p/x *(unsigned long *){}", memory + (mib << 20))]);
    }
    let output = gdb.env_remove("LD_PRELOAD").output().unwrap();
    let (read, refused) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    kill_process(pid_of(&running.child), Signal::USR1).unwrap();
    running.end(Duration::from_secs(60)).is_right();

    // The stamp of a page is a multiple of one number, in the first of its words.
    let stamp = |mib: u64| format!("0x{:x}", (mib << 8).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let stamps: Vec<String> = (0..128).map(stamp).collect();
    let found = read.lines().filter_map(|line| Some(line.strip_prefix('$')?.split_once(" = ")?.1));
    let found: Vec<&str> = found.collect();
    let refused = refused.matches("Cannot access memory").count();
    assert!(found.iter().all(|word| stamps.iter().any(|stamp| stamp == word)), "{read}");
    assert!(found.contains(&stamps[1].as_str()), "the locked page: {read}");
    assert!(found.len() + refused == 128, "{} read, {refused} refused", found.len());
}

/// A program may ask how its parent is scheduled: `SCHED_RESET_ON_FORK` is a flag, and to programs that
/// do not expect it another policy (CPython's `test_posix`).
#[test]
fn a_program_knows_how_its_parent_is_scheduled() {
    let Some(rig) = Rig::new() else { return };
    if !rustix::process::geteuid().is_root() {
        skipped::<()>("the supervisor has real-time priority for root only");
        return;
    }
    let script = "until chrt -p $PPID | grep -q FIFO; do :; done; chrt -p $PPID";
    let mut running = rig.start(&["--local", LIMIT], Path::new("sh"), &["-c", script]);
    let outcome = running.end(Duration::from_secs(60));
    assert!(outcome.status.success(), "{outcome:?}");
    assert!(outcome.stdout.contains("policy: SCHED_FIFO\n"), "{outcome:?}");
}
