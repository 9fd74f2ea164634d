//! Builds what a user gets, and knows where it lies.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use clap::Args;

/// Options of `cargo xtask build`.
#[derive(Args)]
pub(crate) struct BuildOptions {
    /// Optimised, as it is installed.
    #[arg(long)]
    release: bool,
}

/// Options of `cargo xtask install`.
#[derive(Args)]
pub(crate) struct InstallOptions {
    /// Where `bin` and `lib` are.
    #[arg(long, default_value = "/usr/local")]
    prefix: PathBuf,
}

/// The three files that make farmem. The binary finds the other two beside itself.
pub(crate) const SHIPPED: [&str; 3] = ["farmem", "libfarmem_preload.so", "farmem-pagerd"];

/// The three files in one folder, and the programs that tests run under them.
#[derive(Debug, Clone)]
pub(crate) struct Built {
    folder: PathBuf,
}

impl Built {
    /// The path of a built file.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

pub(crate) fn build(options: &BuildOptions) -> anyhow::Result<()> {
    let built = shipped(options.release)?;
    eprintln!("built {} in {}", SHIPPED.join(", "), built.folder.display());
    Ok(())
}

/// Builds the three files.
pub(crate) fn shipped(release: bool) -> anyhow::Result<Built> {
    let profile: &[&str] = if release { &["--release"] } else { &[] };
    cargo(["build", "-p", "farmem", "-p", "farmem-preload"].iter().chain(profile))?;
    // The pager is a process made by clone(CLONE_VM) that must run before, and apart from, any
    // dynamic loader: it is linked statically.
    let pagerd = ["rustc", "-p", "farmem-pagerd"].iter().chain(profile);
    cargo(pagerd.chain(&["--", "-C", "target-feature=+crt-static"]))?;
    let built = Built { folder: target_folder().join(if release { "release" } else { "debug" }) };
    for name in SHIPPED {
        ensure!(built.path(name).is_file(), "the build made no {}", built.path(name).display());
    }
    ensure_static(&built.path("farmem-pagerd"))?;
    Ok(built)
}

/// Builds the three files and the programs that run under them, all optimised.
pub(crate) fn with_workloads() -> anyhow::Result<Built> {
    let built = shipped(true)?;
    workloads()?;
    Ok(built)
}

/// Builds only the programs.
pub(crate) fn workloads() -> anyhow::Result<Built> {
    cargo(&["build", "--release", "-p", "farmem-workloads"])?;
    Ok(Built { folder: target_folder().join("release") })
}

pub(crate) fn install(options: &InstallOptions) -> anyhow::Result<()> {
    let built = shipped(true)?;
    let folder = options.prefix.join("lib/farmem");
    let programs = options.prefix.join("bin");
    for folder in [&folder, &programs] {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    for name in SHIPPED {
        // Replaced by a rename, so that a farmem that runs keeps the file that it was started from.
        let (fresh, place) = (folder.join(format!("{name}.new")), folder.join(name));
        fs::copy(built.path(name), &fresh)
            .and_then(|_| fs::rename(&fresh, &place))
            .with_context(|| format!("install {}", place.display()))?;
    }
    let (link, fresh) = (programs.join("farmem"), programs.join("farmem.new"));
    let _ = fs::remove_file(&fresh);
    std::os::unix::fs::symlink("../lib/farmem/farmem", &fresh)
        .and_then(|()| fs::rename(&fresh, &link))
        .with_context(|| format!("install {}", link.display()))?;
    eprintln!("installed {} -> {}", link.display(), folder.join("farmem").display());
    Ok(())
}

/// Runs cargo in the workspace, its output going where ours goes.
pub(crate) fn cargo<'a>(arguments: impl IntoIterator<Item = &'a &'a str>) -> anyhow::Result<()> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).args(arguments);
    let status = command.status().with_context(|| format!("run {command:?}"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

/// The folder of the workspace.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

pub(crate) fn target_folder() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => workspace().join(folder),
        None => workspace().join("target"),
    }
}

/// Fails if the file asks for a dynamic loader (it has a PT_INTERP program header).
fn ensure_static(file: &Path) -> anyhow::Result<()> {
    const PT_INTERP: u32 = 3;
    let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
    let number = |offset: usize, length: usize| -> Option<usize> {
        let mut number = [0; 8];
        number[..length].copy_from_slice(bytes.get(offset..offset + length)?);
        usize::try_from(u64::from_le_bytes(number)).ok()
    };
    // ELF64: program headers begin at the offset in 32..40, are [54..56] bytes long, [56..58] many.
    let headers = (number(32, 8), number(54, 2), number(56, 2));
    let (true, (Some(first), Some(length), Some(count))) = (bytes.starts_with(b"\x7fELF"), headers)
    else {
        bail!("{} is no ELF file", file.display());
    };
    let interpreted =
        (0..count).any(|index| number(first + index * length, 4) == Some(PT_INTERP as usize));
    ensure!(!interpreted, "{} must be static, but asks for a dynamic loader", file.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_refused() {
        let error = ensure_static(Path::new("/proc/self/exe")).expect_err("tests are dynamic");
        assert!(error.to_string().contains("must be static"), "{error}");
        assert!(ensure_static(&workspace().join("Cargo.toml")).is_err());
    }
}
