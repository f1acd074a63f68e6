{{/* Names. KubeRay appends "-serve-svc" and the like, and takes at most 47 characters. */}}
{{- define "moesaic.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $chart := default .Chart.Name .Values.nameOverride -}}
{{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name $chart) (contains $chart .Release.Name) -}}
{{- end -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "moesaic.serveService" -}}
{{- include "moesaic.fullname" . -}}-serve-svc
{{- end -}}

{{- define "moesaic.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "moesaic.labels" -}}
{{ include "moesaic.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "moesaic.image" -}}
{{- .Values.image.repository -}}:{{- default .Chart.AppVersion .Values.image.tag -}}
{{- end -}}

{{/* Whole cores of a CPU quantity, at least one. */}}
{{- define "moesaic.cores" -}}
{{- $cpu := toString . -}}
{{- if hasSuffix "m" $cpu -}}
{{- max 1 (div (trimSuffix "m" $cpu | int) 1000) -}}
{{- else -}}
{{- max 1 (int $cpu) -}}
{{- end -}}
{{- end -}}

{{/* Numbers of the configuration that shape the cluster, as YAML. */}}
{{- define "moesaic.sizes" -}}
{{- $config := .Values.config -}}
{{- $workers := dig "attention" "workers" 1 $config | int -}}
{{- $hosts := dig "experts" "hosts" 0 $config | int -}}
workers: {{ $workers }}
maxWorkers: {{ max $workers (dig "attention" "max_workers" nil $config | default $workers | int) }}
hosts: {{ $hosts }}
maxHosts: {{ max $hosts (dig "experts" "max_hosts" nil $config | default $hosts | int) }}
grpcPort: {{ dig "grpc" "enabled" true $config | ternary (dig "grpc" "port" 50051 $config | int) 0 }}
drainSeconds: {{ dig "frontend" "drain_timeout_s" 30 $config }}
requestSeconds: {{ dig "frontend" "request_timeout_s" 600 $config }}
{{- end -}}

{{/* The values' configuration with what the chart knows; what the values say wins where both speak. */}}
{{- define "moesaic.config" -}}
{{- $known := dict
    "frontend" (dict "host" "0.0.0.0")
    "attention" (dict "threads" (include "moesaic.cores" .Values.attentionWorkers.resources.limits.cpu | int))
    "experts" (dict "host_threads" (include "moesaic.cores" .Values.expertHosts.resources.limits.cpu | int))
    "ray" (dict
      "worker_resources" (dict "attention-worker" 1)
      "host_resources" (dict "expert-host" 1)
    )
-}}
{{- toYaml (mergeOverwrite $known (deepCopy .Values.config)) -}}
{{- end -}}

{{/* What Ray Serve is told: the content of a `serve deploy` file. */}}
{{- define "moesaic.serveConfig" -}}
{{- $sizes := include "moesaic.sizes" . | fromYaml -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
  {{- /* Above frontend.request_timeout_s, so that ours ends a request first. */}}
  request_timeout_s: {{ add 30 (ceil $sizes.requestSeconds | int) }}
applications:
  - name: moesaic
    route_prefix: /
    import_path: cluster.app:build
    args:
      {{- include "moesaic.config" . | nindent 6 }}
{{- end -}}
