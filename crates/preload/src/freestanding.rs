//! What the compiler expects a C library to have, kept inside this library: it must work under
//! programs whatever their C library is, and must not call one whose lazy binding or interposed
//! functions use the thread pointer that the watcher shares with the program.
//!
//! The symbols are hidden: the program keeps its own.

use core::arch::global_asm;

// Sizes here are a few pages at most, where `rep movsb` is as good as anything longer.
global_asm!(
    ".macro farmem_hidden name",
    ".globl \\name",
    ".hidden \\name",
    ".type \\name, @function",
    "\\name:",
    ".endm",
    ".pushsection .text.farmem_freestanding, \"ax\", @progbits",
    "farmem_hidden memcpy",
    "    mov rax, rdi",
    "    mov rcx, rdx",
    "    rep movsb",
    "    ret",
    "farmem_hidden memmove",
    "    mov rax, rdi",
    "    mov rcx, rdx",
    "    mov r8, rdi",
    "    sub r8, rsi",
    "    cmp r8, rdx",
    "    jb 2f", // The destination begins inside the source: copy from the end.
    "    rep movsb",
    "    ret",
    "2:  lea rdi, [rdi + rdx - 1]",
    "    lea rsi, [rsi + rdx - 1]",
    "    std",
    "    rep movsb",
    "    cld",
    "    ret",
    "farmem_hidden memset",
    "    mov r8, rdi",
    "    mov eax, esi",
    "    mov rcx, rdx",
    "    rep stosb",
    "    mov rax, r8",
    "    ret",
    "farmem_hidden bcmp",
    "farmem_hidden memcmp",
    "    mov rcx, rdx",
    "    xor eax, eax",
    "    cmp eax, eax", // Equal when there is nothing to compare.
    "    repe cmpsb",
    "    je 3f",
    "    movzx eax, byte ptr [rdi - 1]",
    "    movzx ecx, byte ptr [rsi - 1]",
    "    sub eax, ecx",
    "3:  ret",
    ".popsection",
);

/// A broken promise of ours ends the process at the broken place: nothing may unwind through the
/// program, and there is nobody to print to.
#[cfg(panic = "abort")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: `ud2` does not return; the process ends by SIGILL.
    unsafe { core::arch::asm!("ud2", options(noreturn, nomem, nostack)) }
}

// `core` is compiled to unwind and names a personality routine; nothing here ever unwinds.
#[cfg(panic = "abort")]
global_asm!(
    ".globl rust_eh_personality",
    ".hidden rust_eh_personality",
    "rust_eh_personality: ud2",
);
