//! Where credentials come from, in the order of Amazon's own tools: environment, web identity, profile file, container
//! role, instance role.
//!
//! * The profile file is read for each request: a tool may renew keys in it at any time.
//! * No type here shows a key in `Debug`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use object_store::CredentialProvider;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, AwsCredential};

/// What the profile files say when the bucket is opened.
#[derive(Default)]
pub(super) struct Profile {
    pub(super) region: Option<String>,
    file: Option<ProfileFile>,
}

/// A profile with keys.
#[derive(Clone, Debug)]
struct ProfileFile {
    path: PathBuf,
    profile: String,
}

impl Profile {
    pub(super) fn load(environment: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let chosen = environment("AWS_PROFILE");
        let profile = chosen.as_deref().unwrap_or("default");
        let place = |variable: &str, file: &str| {
            environment(variable)
                .map(PathBuf::from)
                .or_else(|| Some(Path::new(&environment("HOME")?).join(".aws").join(file)))
        };
        let credentials = place("AWS_SHARED_CREDENTIALS_FILE", "credentials");
        let config = place("AWS_CONFIG_FILE", "config");
        let mut loaded = Self::default();
        let mut found = false;
        for path in [credentials, config].into_iter().flatten() {
            let Ok(text) = std::fs::read_to_string(&path) else { continue };
            let Some(section) = Section::find(&text, profile) else { continue };
            found = true;
            loaded.region = loaded.region.or_else(|| section.get("region"));
            if loaded.file.is_none() && section.get("aws_access_key_id").is_some() {
                loaded.file = Some(ProfileFile { path, profile: profile.to_owned() });
            }
        }
        match chosen {
            Some(profile) if !found => {
                Err(format!("there is no profile {profile:?} (AWS_PROFILE) in ~/.aws"))
            }
            Some(profile) if loaded.file.is_none() => Err(format!(
                "the profile {profile:?} (AWS_PROFILE) has no aws_access_key_id; roles, SSO and credential_process in \
                 profiles are not supported: export the keys, or use a container or instance role"
            )),
            _ => Ok(loaded),
        }
    }
}

/// Tells `builder` where credentials come from.
pub(super) fn configure(
    mut builder: AmazonS3Builder,
    environment: &dyn Fn(&str) -> Option<String>,
    profile: Profile,
) -> Result<AmazonS3Builder, String> {
    match (environment("AWS_ACCESS_KEY_ID"), environment("AWS_SECRET_ACCESS_KEY")) {
        (Some(id), Some(secret)) => {
            builder = builder.with_access_key_id(id).with_secret_access_key(secret);
            if let Some(token) = environment("AWS_SESSION_TOKEN") {
                builder = builder.with_token(token);
            }
            return Ok(builder);
        }
        (None, None) => (),
        (Some(_), None) => return Err("AWS_ACCESS_KEY_ID is set without AWS_SECRET_ACCESS_KEY".into()),
        (None, Some(_)) => return Err("AWS_SECRET_ACCESS_KEY is set without AWS_ACCESS_KEY_ID".into()),
    }
    use AmazonS3ConfigKey as Key;
    let roles = [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", Key::WebIdentityTokenFile),
        ("AWS_ROLE_ARN", Key::RoleArn),
        ("AWS_ROLE_SESSION_NAME", Key::RoleSessionName),
        ("AWS_ENDPOINT_URL_STS", Key::StsEndpoint),
        ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", Key::ContainerCredentialsRelativeUri),
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", Key::ContainerCredentialsFullUri),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", Key::ContainerAuthorizationTokenFile),
    ];
    let web_identity = environment("AWS_WEB_IDENTITY_TOKEN_FILE").is_some();
    if let (false, Some(file)) = (web_identity, profile.file) {
        return Ok(builder.with_credentials(Arc::new(file)));
    }
    let mut container = false;
    for (variable, key) in roles {
        if let Some(value) = environment(variable) {
            container |= variable.starts_with("AWS_CONTAINER_CREDENTIALS");
            builder = builder.with_config(key, value);
        }
    }
    let no_instance = environment("AWS_EC2_METADATA_DISABLED").is_some_and(|value| value == "true");
    if no_instance && !container && !web_identity {
        return Err(
            "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile with keys \
                    in AWS_PROFILE (the instance's role is switched off by AWS_EC2_METADATA_DISABLED)"
                .into(),
        );
    }
    Ok(builder)
}

#[async_trait]
impl CredentialProvider for ProfileFile {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let refuse = |message: String| object_store::Error::Unauthenticated {
            path: self.path.display().to_string(),
            source: message.into(),
        };
        let text = std::fs::read_to_string(&self.path).map_err(|error| refuse(error.to_string()))?;
        let section = Section::find(&text, &self.profile);
        let key = |name: &str| section.as_ref().and_then(|section| section.get(name));
        let missing = |name: &str| refuse(format!("the profile {:?} has no {name}", self.profile));
        Ok(Arc::new(AwsCredential {
            key_id: key("aws_access_key_id").ok_or_else(|| missing("aws_access_key_id"))?,
            secret_key: key("aws_secret_access_key").ok_or_else(|| missing("aws_secret_access_key"))?,
            token: key("aws_session_token"),
        }))
    }
}

/// One section of an INI file.
struct Section<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Section<'a> {
    /// `[name]`, or `[profile name]` as the config file has it.
    fn find(text: &'a str, name: &str) -> Option<Self> {
        let mut found: Option<Self> = None;
        let mut inside = false;
        for line in text.lines().map(str::trim) {
            if let Some(header) = line.strip_prefix('[').and_then(|line| line.split(']').next()) {
                let header = header.trim();
                let header = header.strip_prefix("profile ").map_or(header, str::trim);
                inside = header == name;
                if inside {
                    found.get_or_insert(Self(Vec::new()));
                }
            } else if let (true, Some(section), Some((key, value))) =
                (inside && !line.starts_with(['#', ';']), &mut found, line.split_once('='))
            {
                section.0.push((key.trim(), value.trim()));
            }
        }
        found
    }

    fn get(&self, key: &str) -> Option<String> {
        let found = self.0.iter().find(|(name, value)| name.eq_ignore_ascii_case(key) && !value.is_empty());
        found.map(|(_, value)| (*value).to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn environment(variables: &[(&str, String)]) -> impl Fn(&str) -> Option<String> + use<> {
        let variables: HashMap<String, String> =
            variables.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        move |name| variables.get(name).cloned()
    }

    #[test]
    fn a_profile_is_found_in_either_file_and_read_anew_for_each_request() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".aws")).unwrap();
        let write =
            |file: &str, text: &str| std::fs::write(home.path().join(".aws").join(file), text).unwrap();
        write(
            "credentials",
            "# keys\n[default]\naws_access_key_id=d\n[shop]\naws_access_key_id = AK1\naws_secret_access_key = S=1\n",
        );
        write("config", "[profile shop]\nregion = eu-west-1\n");
        let home = home.path().display().to_string();
        let profile =
            Profile::load(&environment(&[("HOME", home.clone()), ("AWS_PROFILE", "shop".into())])).unwrap();
        assert_eq!(profile.region.as_deref(), Some("eu-west-1"));
        let file = profile.file.unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let credential = runtime.block_on(file.get_credential()).unwrap();
        assert_eq!((credential.key_id.as_str(), credential.secret_key.as_str()), ("AK1", "S=1"));
        write(
            "credentials",
            "[shop]\naws_access_key_id=AK2\naws_secret_access_key=S2\naws_session_token=T\n",
        );
        let credential = runtime.block_on(file.get_credential()).unwrap();
        assert_eq!((credential.key_id.as_str(), credential.token.as_deref()), ("AK2", Some("T")));
    }

    #[test]
    fn a_profile_that_is_named_must_exist_and_have_keys() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".aws")).unwrap();
        std::fs::write(home.path().join(".aws/config"), "[profile sso]\nsso_session = x\n").unwrap();
        let load = |profile: Option<&str>| {
            let mut variables = vec![("HOME", home.path().display().to_string())];
            variables.extend(profile.map(|profile| ("AWS_PROFILE", profile.to_owned())));
            Profile::load(&environment(&variables)).map(drop)
        };
        assert!(load(Some("typo")).unwrap_err().contains("no profile \"typo\""));
        assert!(load(Some("sso")).unwrap_err().contains("not supported"));
        load(None).unwrap();
    }

    #[test]
    fn half_a_pair_of_keys_is_refused() {
        for variable in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
            let environment = environment(&[(variable, "x".into())]);
            assert!(
                configure(AmazonS3Builder::new(), &environment, Profile::default()).is_err(),
                "{variable}"
            );
        }
    }
}
