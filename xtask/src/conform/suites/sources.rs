//! Debian's source packages: fetched by name, unpacked and built in the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use super::{Cache, run, said};

impl Cache {
    /// The unpacked source of a package, built by `build`, a shell script that runs there. What was
    /// built once is taken as it is.
    pub(super) fn source(&self, package: &str, build: &str) -> anyhow::Result<PathBuf> {
        let folder = self.folder.join(package);
        let built = folder.join("built");
        if !built.exists() {
            self.packages(&["dpkg-dev", "gcc", "libc6-dev", "make"])?;
            let _ = fs::remove_dir_all(&folder);
            fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
            self.fetch(package, &folder)?;
            let tree = unpacked(&folder)?;
            run(Command::new("sh").args(["-ec", build]).current_dir(&tree))?;
            fs::write(&built, "").context("note that it is built")?;
        }
        unpacked(&folder)
    }

    /// Asks the machine's own package archives, for sources where it asks for programs.
    fn fetch(&self, package: &str, folder: &Path) -> anyhow::Result<()> {
        let apt = self.folder.join("apt");
        let lists = apt.join("lists/partial");
        let parts = apt.join("sources.d");
        for needed in [&lists, &parts, &apt.join("archives/partial")] {
            fs::create_dir_all(needed).with_context(|| format!("create {}", needed.display()))?;
        }
        source_archives(&parts)?;
        let options = [
            "Dir::Etc::sourcelist=/dev/null".to_owned(),
            format!("Dir::Etc::sourceparts={}", parts.display()),
            format!("Dir::State::lists={}", apt.join("lists").display()),
            format!("Dir::Cache={}", apt.display()),
            "APT::Sandbox::User=root".to_owned(),
        ];
        let apt_get = || {
            let mut command = Command::new("apt-get");
            command.args(options.iter().flat_map(|option| ["-o", option])).current_dir(folder);
            command
        };
        // Archives without sources make this fail; the others have been read then.
        let _ = run(apt_get().args(["--quiet", "update"]));
        // An archive may list a version whose files it has not got.
        let newest = run(apt_get().args(["--quiet", "source", package]));
        let Err(newest) = newest else { return Ok(()) };
        let mut cache = Command::new("apt-cache");
        cache.args(options.iter().flat_map(|option| ["-o", option]));
        let known = said(cache.args(["showsrc", package]))?;
        let versions = known.lines().filter_map(|line| line.strip_prefix("Version: "));
        for version in versions {
            let source = format!("{package}={}", version.trim());
            if run(apt_get().args(["--quiet", "source", &source])).is_ok() {
                return Ok(());
            }
        }
        Err(newest)
    }
}

/// The only folder in the folder of a package.
fn unpacked(folder: &Path) -> anyhow::Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let tree = entries.flatten().map(|entry| entry.path()).find(|path| path.is_dir());
    tree.with_context(|| format!("nothing was unpacked in {}", folder.display()))
}

/// The archives that this machine has its packages from, for their sources.
fn source_archives(to: &Path) -> anyhow::Result<()> {
    let folder = Path::new("/etc/apt/sources.list.d");
    let listed = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    for file in listed.chain([PathBuf::from("/etc/apt/sources.list")]) {
        let (Ok(text), Some(name)) = (fs::read_to_string(&file), file.file_name()) else {
            continue;
        };
        let text = text.replace("Types: deb\n", "Types: deb-src\n");
        let lines = text.lines().map(|line| match line.strip_prefix("deb ") {
            Some(rest) => format!("deb-src {rest}\n"),
            None => format!("{line}\n"),
        });
        fs::write(to.join(name), lines.collect::<String>()).context("write the archives")?;
    }
    Ok(())
}
