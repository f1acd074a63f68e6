{{/* What a schema cannot say; each failure names the value and the way out. */}}
{{- define "moesaic.validate" -}}
{{- if and .Values.requireKubeRay (not (.Capabilities.APIVersions.Has "ray.io/v1/RayService")) -}}
{{- fail "KubeRay is not installed in this cluster (no ray.io/v1 RayService): install the kuberay-operator chart first, or set requireKubeRay=false to render without a cluster" -}}
{{- end -}}
{{- $name := include "moesaic.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the name %s must start with a letter and have only small letters, digits and '-': set fullnameOverride" $name) -}}
{{- end -}}
{{- $sizes := include "moesaic.sizes" . | fromYaml -}}
{{- if le (float64 .Values.terminationGracePeriodSeconds) (float64 $sizes.drainSeconds) -}}
{{- fail (printf "terminationGracePeriodSeconds (%v) must be above config.frontend.drain_timeout_s (%v), or pods are killed with answers under way" .Values.terminationGracePeriodSeconds $sizes.drainSeconds) -}}
{{- end -}}
{{- if and .Values.gcsFaultTolerance.enabled (not .Values.gcsFaultTolerance.redisAddress) -}}
{{- fail "gcsFaultTolerance.enabled needs gcsFaultTolerance.redisAddress (host:port)" -}}
{{- end -}}
{{- if and .Values.redis.existingSecret (dig "redis" "url" "" .Values.config) -}}
{{- fail "redis.existingSecret and config.redis.url both say where Redis is: give one" -}}
{{- end -}}
{{- end -}}
