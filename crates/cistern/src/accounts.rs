//! The accounts and the database that a first start makes, from the environment variables of the official images.
//!
//! * Without any of them, root has no password and exists for this machine only.
//! * Passwords travel through the environment or a file and the bootstrap's standard input, never on a command line.

/// What the environment asks of a first start.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Accounts {
    root_password: Option<String>,
    root_everywhere: bool,
    database: Option<String>,
    user: Option<(String, String)>,
}

/// The variables that are read here, and kept from the server's own environment.
pub const VARIABLES: [&str; 5] = ["ROOT_PASSWORD", "ALLOW_EMPTY_PASSWORD", "DATABASE", "USER", "PASSWORD"];

impl Accounts {
    /// Reads `MYSQL_…`, `MARIADB_…` and their `_FILE` forms through `variable`; MARIADB wins, as in the official image.
    ///
    /// # Errors
    /// A sentence for the operator when the variables contradict each other or a file can't be read.
    pub fn from_environment(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let [root_password, allow_empty, database, user, password] =
            VARIABLES.map(|name| value_of(name, variable));
        let (root_password, allow_empty, database) = (root_password?, allow_empty?, database?);
        let user = match (user?, password?) {
            (Some(name), _) if name == "root" => {
                return Err("MYSQL_USER is root: set MYSQL_ROOT_PASSWORD instead".into());
            }
            (Some(name), Some(password)) => Some((name, password)),
            (Some(name), None) => return Err(format!("MYSQL_USER is {name}, but MYSQL_PASSWORD is not set")),
            (None, Some(_)) => return Err("MYSQL_PASSWORD is set, but MYSQL_USER is not".into()),
            (None, None) => None,
        };
        let root_everywhere = root_password.is_some() || allow_empty.is_some();
        Ok(Self { root_password, root_everywhere, database, user })
    }

    /// SQL for the bootstrap, one statement a line; saying it twice does no harm.
    pub fn sql(&self) -> String {
        let mut lines = vec!["FLUSH PRIVILEGES;".to_owned()];
        let password = quoted(self.root_password.as_deref().unwrap_or(""));
        let hosts: &[&str] =
            if self.root_everywhere { &["localhost", "%"] } else { &["localhost", "127.0.0.1", "::1"] };
        for host in hosts {
            lines.push(format!("CREATE OR REPLACE USER 'root'@'{host}' IDENTIFIED BY {password};"));
            lines.push(format!("GRANT ALL ON *.* TO 'root'@'{host}' WITH GRANT OPTION;"));
            // GRANT PROXY asks who is asking, and a bootstrap is nobody.
            lines.push(format!(
                "REPLACE INTO mysql.proxies_priv VALUES ('{host}', 'root', '', '', TRUE, '', now());"
            ));
        }
        if let Some(database) = &self.database {
            lines.push(format!("CREATE DATABASE IF NOT EXISTS {};", identifier(database)));
        }
        if let Some((user, password)) = &self.user {
            lines.push(format!(
                "CREATE OR REPLACE USER {}@'%' IDENTIFIED BY {};",
                quoted(user),
                quoted(password)
            ));
            if let Some(database) = &self.database {
                // `_` in a grant is a wildcard, so it is escaped, as the official image does.
                let pattern = identifier(&database.replace('_', "\\_"));
                lines.push(format!("GRANT ALL ON {pattern}.* TO {}@'%';", quoted(user)));
            }
        }
        lines.join("\n") + "\n"
    }
}

fn value_of(name: &str, variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<String>, String> {
    for family in ["MARIADB", "MYSQL"] {
        let full = format!("{family}_{name}");
        if let Some(value) = variable(&full).filter(|value| !value.is_empty()) {
            return Ok(Some(value));
        }
        if let Some(path) = variable(&format!("{full}_FILE")).filter(|path| !path.is_empty()) {
            let text = std::fs::read_to_string(&path)
                .map_err(|error| format!("{full}_FILE names {path}: {error}"))?;
            return Ok(Some(text.trim_end_matches(['\n', '\r']).to_owned()));
        }
    }
    Ok(None)
}

/// A string literal. The bootstrap reads a statement a line, so line breaks are escaped as well.
fn quoted(text: &str) -> String {
    let mut literal = String::with_capacity(text.len() + 2);
    literal.push('\'');
    for character in text.chars() {
        match character {
            '\'' | '\\' => literal.extend(['\\', character]),
            '\n' => literal.push_str("\\n"),
            '\r' => literal.push_str("\\r"),
            '\0' => literal.push_str("\\0"),
            other => literal.push(other),
        }
    }
    literal.push('\'');
    literal
}

fn identifier(name: &str) -> String {
    format!("`{}`", name.replace('`', "``"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts(set: &[(&str, &str)]) -> Result<Accounts, String> {
        Accounts::from_environment(&|name| {
            set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn without_variables_root_is_for_this_machine_only() {
        let sql = accounts(&[]).expect("nothing contradicts").sql();
        assert!(sql.contains("'root'@'127.0.0.1'") && sql.contains("'root'@'localhost'"));
        assert!(!sql.contains("'root'@'%'"));
    }

    #[test]
    fn a_password_opens_root_to_the_network_and_is_quoted() {
        let sql = accounts(&[("MYSQL_ROOT_PASSWORD", "it's\\\n")]).expect("nothing contradicts").sql();
        assert!(sql.contains(r"'root'@'%' IDENTIFIED BY 'it\'s\\\n'"), "{sql}");
    }

    #[test]
    fn a_user_gets_the_database_and_no_more() {
        let set = [("MYSQL_DATABASE", "my_app"), ("MYSQL_USER", "app"), ("MARIADB_PASSWORD", "x")];
        let sql = accounts(&set).expect("nothing contradicts").sql();
        assert!(sql.contains("CREATE DATABASE IF NOT EXISTS `my_app`;"));
        assert!(sql.contains(r"GRANT ALL ON `my\_app`.* TO 'app'@'%';"), "{sql}");
    }

    #[test]
    fn half_an_account_is_refused_by_name() {
        assert!(accounts(&[("MYSQL_USER", "app")]).expect_err("no password").contains("MYSQL_PASSWORD"));
        assert!(accounts(&[("MYSQL_PASSWORD", "x")]).expect_err("no user").contains("MYSQL_USER"));
        assert!(
            accounts(&[("MYSQL_USER", "root"), ("MYSQL_PASSWORD", "x")]).expect_err("root").contains("ROOT")
        );
    }
}
