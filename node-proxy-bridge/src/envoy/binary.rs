//! Which Envoy: where it is and whether it is new enough.

use std::fmt;
use std::path::{Path, PathBuf};

use tokio::process::Command;

/// The oldest Envoy that does what is asked of it; older ones were not tried.
pub const OLDEST: Version = Version {
    major: 1,
    minor: 40,
    patch: 0,
};
/// How a machine's own one is called.
const NAME: &str = "envoy";

/// An Envoy's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 1.
    pub major: u16,
    /// Four a year.
    pub minor: u16,
    /// Fixes.
    pub patch: u16,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// A binary that said its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binary {
    /// Where.
    pub path: PathBuf,
    /// Which.
    pub version: Version,
}

/// Why there is no Envoy to start.
#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    /// Neither named nor in the places looked at.
    #[error(
        "no `envoy` in $PATH{}; name one with `--envoy PATH`",
        beside.as_ref().map(|b| format!(" and none at `{}`", b.display())).unwrap_or_default()
    )]
    Absent {
        /// The place beside $PATH that was looked at.
        beside: Option<PathBuf>,
    },
    /// It doesn't run.
    #[error("can't run `{} --version`", path.display())]
    Run {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It says something else.
    #[error("`{} --version` says `{said}`, which is no version of Envoy", path.display())]
    NoVersion {
        /// Which.
        path: PathBuf,
        /// What it said.
        said: String,
    },
    /// It is too old.
    #[error("`{}` is Envoy {version}, Thyra needs {OLDEST} or newer", path.display())]
    TooOld {
        /// Which.
        path: PathBuf,
        /// What it is.
        version: Version,
    },
}

impl Binary {
    /// The Envoy that `named` names, else the one in $PATH, else the one at `beside`.
    ///
    /// # Errors
    /// There is none, or it is not one that can be used.
    pub async fn find(named: Option<&Path>, beside: Option<&Path>) -> Result<Self, BinaryError> {
        let path = match named {
            Some(path) => path.to_owned(),
            None => in_path()
                .or_else(|| beside.filter(|path| path.is_file()).map(Path::to_owned))
                .ok_or_else(|| BinaryError::Absent {
                    beside: beside.map(Path::to_owned),
                })?,
        };
        Self::check(path).await
    }

    async fn check(path: PathBuf) -> Result<Self, BinaryError> {
        let output = match Command::new(&path).arg("--version").output().await {
            Ok(output) => output,
            Err(source) => return Err(BinaryError::Run { path, source }),
        };
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let Some(version) = parse(&said) else {
            return Err(BinaryError::NoVersion { path, said });
        };
        if version < OLDEST {
            return Err(BinaryError::TooOld { path, version });
        }
        Ok(Self { path, version })
    }
}

fn in_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(NAME))
        .find(|file| file.is_file())
}

/// `envoy  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL`; a build's own suffix (`1.40.0-dev`) says nothing.
fn parse(said: &str) -> Option<Version> {
    let (_, rest) = said.split_once("version:")?;
    let number = rest.trim().split('/').nth(1)?;
    let mut parts = number.split(['.', '-']).map(|part| part.parse::<u16>().ok());
    Some(Version {
        major: parts.next()??,
        minor: parts.next()??,
        patch: parts.next()??,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_envoy_writes_them() {
        let said = |number: &str| format!("\n./envoy  version: 0ab1/{number}/Clean/RELEASE/BoringSSL\n");
        assert_eq!(parse(&said("1.40.0")), Some(OLDEST));
        assert_eq!(parse(&said("1.40.0-dev")), Some(OLDEST));
        assert!(parse(&said("1.9.3")).is_some_and(|version| version < OLDEST));
        assert!(parse(&said("1.100.0")).is_some_and(|version| version > OLDEST));
        assert_eq!(parse("nginx version: nginx/1.22"), None);
    }
}
